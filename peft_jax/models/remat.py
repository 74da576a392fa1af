"""What a layer keeps for its backward pass, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def kept(x: jax.Array) -> jax.Array:
    """Mark a result that is dear to compute: the outputs of a layer's products and of its attention."""
    return checkpoint_name(x, KEPT)


def rematerialized(body: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
    """The body of a scan over layers whose backward pass starts from what is marked, or from the layer's input alone.

    Masks, scores, norms and activations are cheap to compute again and large to keep: the scores of the attention
    alone are (batch, heads, length, length) in each layer.
    """
    policy = None if whole else jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
