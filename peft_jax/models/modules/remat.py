"""Rematerialization: which values a layer keeps for its backward pass, and which it computes again."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import picked

KEPT = "kept"
NARROW = 8  # times fewer features than it was made of: what is kept without a mark


def kept(x: jax.Array) -> jax.Array:
    """Mark a result that is dear to compute: the outputs of a layer's products and of its attention."""
    return checkpoint_name(x, KEPT)


def rematerialized(body: Callable[..., Any], *, whole: bool) -> Callable[..., Any]:
    """The body of a scan over layers whose backward pass starts from what is marked, or from the layer's input alone.

    With what is marked it keeps narrow products, as those with an adapter's first factor: next to nothing to hold, and
    nearly as long to compute as ten times wider ones.

    Masks, scores, norms and activations are cheap to compute again and large to keep: the scores of the attention
    alone are (batch, heads, length, length) in each layer.
    """
    marked = jax.checkpoint_policies.save_only_these_names(KEPT)
    policy = None if whole else jax.checkpoint_policies.save_from_both_policies(marked, _is_narrow)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _is_narrow(primitive: Any, *operands: Any, **params: PyTree) -> bool:
    """Whether an equation is a product of x (..., in) and a matrix (in, out) with few outputs."""
    if primitive.name != "dot_general" or params["dimension_numbers"][1][0]:
        return False
    (over, _), (x, matrix) = params["dimension_numbers"][0], operands
    n_in = math.prod(picked(x.shape, over))
    return bool(NARROW * matrix.size <= n_in * n_in)
