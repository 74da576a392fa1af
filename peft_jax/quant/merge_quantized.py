"""Fold adapters into a quantized base and round the sum to the base's format again."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from peft_jax.core.adapted import Adapted, is_adapted
from peft_jax.core.merge import merge
from peft_jax.core.paths import dotted
from peft_jax.quant.quantized import Quantized

T = TypeVar("T")


def merge_quantized(params: T) -> tuple[T, dict[str, float]]:
    """Merge adapters into their quantized bases, in the bases' own formats, and report what the rounding loses.

    `peft_jax.merge` gives plain arrays instead. Better than this is merging into the float weights that the base was
    made of, as ``peft-jax merge`` does, and quantizing the result: then weights are rounded once, here twice.

    Args:
        params: Any pytree, or a model handle. Adapters on plain arrays are merged as by `peft_jax.merge`; quantized
            leaves without an adapter stay as they are.

    Returns:
        The tree without adapters; and for each quantized leaf that had one, by its path, the norm of the rounding's
        error relative to the norm of the merged weight.

    Raises:
        MergeError: if a leaf has no merged form, or it is not finite.

    Example:
        >>> import peft_jax as pj
        >>> base = pj.quantize({"q": {"kernel": jnp.eye(64)}}, kind="nf4")
        >>> adapted = pj.apply_lora(base, pj.LoraConfig(target_modules=["q"]))
        >>> merged, errors = merge_quantized(adapted)
        >>> type(merged["q"]["kernel"]).__name__, errors
        ('NF4', {'q.kernel': 0.0})
    """
    errors: dict[str, float] = {}

    def merged(key_path: Any, leaf: Any) -> Any:
        if not is_adapted(leaf):
            return leaf
        base = _innermost(leaf)
        dense = merge(leaf)
        if not isinstance(base, Quantized):
            return dense
        rounded = base.requantized(dense)
        exact = dense.astype(jnp.float32)
        lost = jnp.linalg.norm((rounded.dense().astype(jnp.float32) - exact).ravel())
        errors[dotted(key_path)] = float(lost / jnp.linalg.norm(exact.ravel()))
        return rounded

    return jax.tree_util.tree_map_with_path(merged, params, is_leaf=is_adapted), errors


def _innermost(leaf: Adapted) -> Any:
    """The leaf under all adapters."""
    base: Any = leaf
    while is_adapted(base):
        base = base.base
    return base
