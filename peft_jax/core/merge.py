"""Whole-tree operations: merge, unload, and switching adapters. All pure: each gives a new tree."""

import dataclasses
from typing import Any

import jax

from peft_jax.core.adapted import Adapted, adapters, map_adapted
from peft_jax.core.finite import holds_finite
from peft_jax.core.paths import dotted
from peft_jax.core.weight import MergeError, dense_in_ensemble, is_weight


def merge(params: Any) -> Any:
    """Plain arrays for the unwrapped function: active adapters folded in, quantized leaves dequantized.

    Raises:
        MergeError: if a leaf has no merged form, or its merged values are not finite, as where they are beyond what
            float16 holds. Under `jax.jit` there are no values to look at.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = {"q": {"kernel": jnp.eye(2)}}
        >>> merge(pj.apply_lora(params, pj.LoraConfig(target_modules=["q"])))["q"]["kernel"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def dense(key_path: Any, leaf: Any) -> Any:
        if not is_weight(leaf):
            return leaf
        array = dense_in_ensemble(leaf)
        if not holds_finite(array):
            raise MergeError(
                f"Merging leaf '{dotted(key_path)}' gives NaN or infinity in {array.dtype}. Merge into a base of a "
                "wider element type, or check the adapter's arrays."
            )
        return array

    return jax.tree_util.tree_map_with_path(dense, params, is_leaf=is_weight)


def unload(params: Any) -> Any:
    """The tree without any adapter: the base's own leaves, quantized where they were."""
    return map_adapted(lambda _, leaf: leaf.base, params)


def set_adapter(params: Any, adapter_name: str) -> Any:
    """The tree with one adapter active and all others not.

    Raises:
        ValueError: if the tree has no adapter of that name.
    """
    _known(params, adapter_name)
    return map_adapted(lambda _, leaf: dataclasses.replace(leaf, active=leaf.tag.name == adapter_name), params)


def disable_adapter(params: Any) -> Any:
    """The tree with no adapter active: it computes what its base computes."""
    return map_adapted(lambda _, leaf: dataclasses.replace(leaf, active=False), params)


def delete_adapter(params: Any, adapter_name: str) -> Any:
    """The tree without one adapter.

    Raises:
        ValueError: if the tree has no adapter of that name.
    """
    _known(params, adapter_name)

    def drop(_: str, leaf: Adapted) -> Any:
        return leaf.base if leaf.tag.name == adapter_name else leaf

    return map_adapted(drop, params)


def _known(params: Any, adapter_name: str) -> None:
    if adapter_name not in (found := adapters(params)):
        raise ValueError(f"No adapter is named '{adapter_name}'. Found: {sorted(found)}.")
