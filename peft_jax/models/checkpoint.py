"""Models to and from Hugging Face checkpoints."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.interop.checkpoint import find_checkpoint, load_params, open_tensors, read_config, save_checkpoint
from peft_jax.interop.files import GENERATION_CONFIG
from peft_jax.models.config import ModelConfig
from peft_jax.models.families import family_of, read_architecture
from peft_jax.models.family import Family
from peft_jax.quant import quantize_array

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    name_or_path: str | os.PathLike[str], *, dtype: Any = None, load_in_8bit: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
    """Read architecture and parameters of a checkpoint.

    Args:
        name_or_path: A folder, or an id on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16", for all floating-point leaves; None for the one that config.json
            names, or else that of the first tensor.
        load_in_8bit: Whether to round the linear kernels of the layers to int8, tensor by tensor while loading.
            Embedding, norms, biases and head stay floating-point.

    Raises:
        FileNotFoundError: There is no such folder or id, or a file is missing in it.
        ValueError: The model is of another family or asks for something that is not supported, a file is damaged, or
            the tensors are not those of the config.
    """
    folder = find_checkpoint(name_or_path)
    hf = read_config(folder)
    config = _with_generation_ids(read_architecture(hf), folder)
    tensors = open_tensors(folder)
    if dtype is None:
        dtype = hf.get("dtype") or hf.get("torch_dtype") or next(iter(tensors.values())).dtype
    if (dtype if isinstance(dtype, str) else jnp.dtype(dtype).name) not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported. Write dtype= one of {', '.join(DTYPES)}.")
    family = family_of(config)
    config, tensors = _settle_tie(family, config, tensors)
    convert = _converter(family, jnp.dtype(dtype), load_in_8bit)
    return config, load_params(tensors, family.rows(config), convert, ignored=family.ignored)


@functools.lru_cache(maxsize=8)
def _converter(family: Family, dtype: jnp.dtype, load_in_8bit: bool) -> Callable[[str, jax.Array], Any]:
    """Make what happens to each tensor on its way; one function for each choice, so that programs are shared."""

    def convert(path: str, array: jax.Array) -> Any:
        layout = family.layout(path)
        if load_in_8bit and layout is not None and layout.inp:
            return quantize_array(array, layout).astype(dtype)  # rounded once, from the stored element type
        return array.astype(dtype)

    return convert


def save_model(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | os.PathLike[str],
    *,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a checkpoint that transformers reads, in the element types of the leaves.

    Args:
        params: The parameters, dense arrays, as from `peft_jax.models.llama.init_params`.
        config: Their architecture.
        folder: Folder to write to; made if need be. Weights of a former checkpoint in it are removed.
        generation_config: Contents of generation_config.json; not written if there are none.
        max_shard_size: Bytes above which the weights are split into several files.

    Raises:
        ValueError: No Hugging Face class has this combination of config fields.

    Example:
        >>> import tempfile
        >>> from peft_jax.models.llama import LlamaConfig, init_params
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(init_params(config, jax.random.key(0)), config, folder)
        ...     load_model(folder)[0] == config
        True
    """
    family = family_of(config)
    dtype = str(jnp.dtype(family.embedding_table(config, params).dtype))
    hf = {**config.to_hf(), "dtype": dtype}
    generation = dict(generation_config) if generation_config else None
    rows = family.rows(config)
    save_checkpoint(folder, params, rows, hf, generation_config=generation, max_shard_size=max_shard_size)


def read_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read generation_config.json; empty if there is none.

    Raises:
        ValueError: It is not a JSON object.
    """
    try:
        return read_config(folder, GENERATION_CONFIG)
    except FileNotFoundError:
        return {}


def _with_generation_ids(config: ModelConfig, folder: os.PathLike[str]) -> ModelConfig:
    """Take the ids that end and pad a text from generation_config.json, which transformers' generate heeds first."""
    found = read_generation_config(folder)
    ids: dict[str, Any] = {
        name: found[name] for name in ("eos_token_id", "pad_token_id") if found.get(name) is not None
    }
    ids = {name: tuple(value) if isinstance(value, list) else value for name, value in ids.items()}
    return dataclasses.replace(config, **ids)


def _settle_tie(
    family: Family, config: ModelConfig, tensors: dict[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Do as transformers 5 does where the config ties the head, and the checkpoint has one nevertheless."""
    embedding, head = (f"{name}.weight" for name in family.tied_modules(config) or ("", ""))
    if head not in tensors:
        return config, tensors
    if embedding in tensors and not np.array_equal(tensors[embedding], tensors[head]):
        return dataclasses.replace(config, tie_word_embeddings=False), tensors
    rest = {key: tensor for key, tensor in tensors.items() if key != head}
    return config, {embedding: tensors[head], **rest}
