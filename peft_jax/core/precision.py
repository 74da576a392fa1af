"""The element types of an adapter's arrays and of its products: float32 mostly, or that of its base."""

import dataclasses
from collections.abc import Collection
from typing import TypeVar

import jax
import jax.numpy as jnp

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, adapters, map_adapted
from peft_jax.core.pytree import PyTree

T = TypeVar("T")
ComputeDtype = str | jnp.dtype | type
COMPUTED = ("float32", "bfloat16", "float16")


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


def with_compute_dtype(params: T, dtype: ComputeDtype | None, adapter_name: str = "default") -> T:
    """The tree or model handle whose products with an adapter's arrays are of an element type.

    The arrays stay as they are, as do their gradients, the optimizer's state, the file, and a merge: each product
    converts them. In bfloat16 on a bfloat16 base no float32 copy of a layer's inputs is made, nor kept for the backward
    pass. Weights that an adapter trains whole (``modules_to_save``, biases, tokens) are computed with as before.

    Args:
        params: A tree or model handle with the adapter.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None leaves all as it is.
        adapter_name: Which adapter.

    Raises:
        ValueError: if it is another type, the adapter is a prompt, there is none of the name, or it trains
            whole arrays alone.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
        >>> params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> with_compute_dtype(params, "bfloat16")["q"]["kernel"].compute_dtype
        dtype(bfloat16)
    """
    kind = checked_compute_dtype(dtype)
    if kind is None:
        return params
    config = adapters(params).get(adapter_name)
    if config is None:
        raise ValueError(
            f"compute_dtype is set for adapter '{adapter_name}', which is not there. Found: {sorted(adapters(params))}."
        )
    if config.on_model:
        raise ValueError(
            f"compute_dtype is for products of adapters with inputs. {type(config).__name__} has none. Leave it out."
        )

    def mark(_: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != adapter_name or leaf.tag.role is not None:
            return leaf
        return dataclasses.replace(leaf, compute_dtype=kind)

    leaves = [leaf for _, leaf in adapted_leaves(params) if leaf.tag.name == adapter_name]
    if all(leaf.tag.role is not None for leaf in leaves):
        raise ValueError(
            f"compute_dtype is for products of adapters with inputs, and adapter '{adapter_name}' trains whole arrays "
            "alone. Leave it out."
        )
    marked: T = map_adapted(mark, params)
    return marked


def common_compute_dtype(params: PyTree, adapter_names: Collection[str]) -> jnp.dtype | None:
    """The element type of the products of several adapters; None if it was not set for all of them, or differs.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
        >>> config = pj.LoraConfig(r=2, target_modules=["q"])
        >>> params = pj.apply_lora(params, config, compute_dtype="bfloat16")
        >>> common_compute_dtype(params, ["default"])
        dtype(bfloat16)
    """
    found = {
        leaf.compute_dtype
        for _, leaf in adapted_leaves(params)
        if leaf.tag.name in adapter_names and leaf.tag.role is None
    }
    return found.pop() if len(found) == 1 else None


def checked_compute_dtype(dtype: ComputeDtype | None) -> jnp.dtype | None:
    """The element type that a value of ``compute_dtype`` names; None for None.

    Raises:
        ValueError: if products are not computed in it.

    Example:
        >>> checked_compute_dtype("bfloat16")
        dtype(bfloat16)
    """
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in COMPUTED:
        raise ValueError(
            f"compute_dtype={name!r} is none of {', '.join(COMPUTED)}. Write one of them, or leave it out."
        )
    return jnp.dtype(name)
