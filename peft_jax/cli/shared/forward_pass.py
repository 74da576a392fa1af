"""The forward passes of the commands: logits of a model handle."""

from collections.abc import Callable
from typing import Any

import jax

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
