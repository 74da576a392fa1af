"""The forward passes of the commands: logits of a model handle."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.models.modules.lazy_logits import LazyLogits


def apply(model: Callable[..., Any], input_ids: jax.Array, attention_mask: jax.Array, **more: jax.Array) -> jax.Array:
    """Logits of a model handle, as the steps of `peft_jax.train` take it; ``more`` is what they hand on of a batch."""
    logits: jax.Array = model(input_ids, attention_mask=attention_mask, **more).logits
    return logits


def apply_lazily(
    model: Callable[..., Any], input_ids: jax.Array, attention_mask: jax.Array, **more: jax.Array
) -> LazyLogits:
    """As `apply`, of a causal language model, whose logits the loss computes in chunks."""
    logits: LazyLogits = model(input_ids, attention_mask=attention_mask, lazy_logits=True, **more).logits
    return logits


def apply_spans(
    model: Callable[..., Any], input_ids: jax.Array, attention_mask: jax.Array, **more: jax.Array
) -> jax.Array:
    """As `apply`, of a model of spans: logits of both ends (batch, length, 2)."""
    output = model(input_ids, attention_mask=attention_mask, **more)
    return jnp.stack([output.start_logits, output.end_logits], axis=-1)
