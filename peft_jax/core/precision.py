"""The element type of an adapter's arrays: float32 mostly, or that of its base."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from peft_jax.core.adapted import Adapted, map_adapted

T = TypeVar("T")


def in_base_dtype(params: T, adapter_name: str = "default") -> T:
    """The tree or model handle with an adapter's trained arrays in the element type of the leaf that they adapt.

    Adapters are float32, so that small updates are not lost; this halves their memory on a bfloat16 base, at the cost
    of such updates. PEFT calls it ``autocast_adapter_dtype=False``.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
        >>> params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> [in_base_dtype(tree)["q"]["kernel"].params["lora_A"].dtype.name for tree in (params,)]
        ['bfloat16']
    """

    def cast(_: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != adapter_name or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return dataclasses.replace(leaf, params=jax.tree.map(lambda array: array.astype(leaf.dtype), leaf.params))

    cast_tree: T = map_adapted(cast, params)
    return cast_tree
