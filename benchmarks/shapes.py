"""Llama shapes by name, and the folders of their random checkpoints. Imports neither JAX nor PyTorch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Size = Literal["tiny", "30m", "125m", "1b", "3b", "8b"]
Dtype = Literal["float32", "bfloat16"]

_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES: dict[Size, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "30m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "125m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "1b": {  # Llama 3.2 1B
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "3b": {  # Llama 3.2 3B
        **_LLAMA_3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {  # Llama 3.1 8B
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def checkpoint_folder(build: Path, size: Size, dtype: Dtype) -> Path:
    """The folder of the random checkpoint of a shape."""
    return build / "checkpoints" / f"llama-{size}-{dtype}"


def read_shape(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json."""
    found: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return found


def token_ids(shape: Mapping[str, Any], rows: int, length: int) -> np.ndarray:
    """Random tokens ``(rows, length)``, int32, the same on every call."""
    return np.random.default_rng(0).integers(0, shape["vocab_size"], (rows, length), dtype=np.int32)


def left_padded(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of texts (rows, longest) with zeros on their left, and 1 where tokens are; both int64."""
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, -len(text) :] = text
        mask[row, -len(text) :] = 1
    return ids, mask


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that is one of ``ends``, with it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


def weight_flops(shape: dict[str, Any], tokens: int) -> int:
    """Operations of the products with frozen weights in a training step: forward and the gradient of their inputs."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    size = shape.get("head_dim") or hidden // heads
    attention = 2 * hidden * size * (heads + shape["num_key_value_heads"])
    layer = attention + 3 * hidden * inner
    return 4 * tokens * (shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])
