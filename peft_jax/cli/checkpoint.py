"""What the commands share about a checkpoint: its tokenizer and its forward pass."""

from typing import Any

import jax
from transformers import AutoTokenizer


def apply(
    model: Any, input_ids: jax.Array, attention_mask: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Logits (batch, length, vocabulary) of a model handle, as the steps of `peft_jax.train` take it."""
    return model(input_ids, attention_mask=attention_mask, segment_ids=segment_ids).logits


def load_tokenizer(model: str) -> Any:
    """Read the tokenizer that lies in a checkpoint's folder, or on the hub.

    Raises:
        ValueError: If there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be read from {model}. Put tokenizer.json and tokenizer_config.json beside the weights."
        ) from error
