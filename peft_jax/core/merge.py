"""Whole-tree operations: merge, unload, and switching adapters. All pure: each gives a new tree."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from peft_jax.core.adapted import Adapted, is_adapted, nested_adapters
from peft_jax.core.adapted_tree import adapted_leaves, adapters, map_adapted
from peft_jax.core.finite import holds_finite
from peft_jax.core.handle import Handle
from peft_jax.core.paths import dotted
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import MergeError, dense_in_ensemble, is_weight


def merge(params: PyTree) -> Any:
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


def unload(params: PyTree) -> Any:
    """The tree without any adapter: the base's own leaves, quantized where they were."""
    return map_adapted(lambda _, leaf: leaf.base, params)


def set_adapter(params: PyTree, adapter_name: str | Sequence[str], *, inference_mode: bool | None = None) -> Any:
    """The tree with one adapter active, or several, and all others not.

    Several are applied in the order of their names, each on the weight that the ones before it make.

    Args:
        params: A tree or model handle with the adapters.
        adapter_name: Name of an adapter, or several.
        inference_mode: Whether these are frozen from now on; None leaves that as it is.

    Raises:
        ValueError: if the tree has no adapter of a name, or a name is there twice.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jax.numpy.eye(2)}}
        >>> for name in "ab":
        ...     params = pj.apply_lora(params, pj.LoraConfig(target_modules=["q"]), adapter_name=name)
        >>> active_adapters(set_adapter(params, "b")), active_adapters(set_adapter(params, ["b", "a"]))
        (['b'], ['b', 'a'])
    """
    names = _names(params, adapter_name)
    new = map_adapted(lambda _, leaf: dataclasses.replace(leaf, active=leaf.tag.name in names), params)
    new = _in_order(new, names)
    return new if inference_mode is None else set_requires_grad(new, names, not inference_mode)


def set_requires_grad(params: PyTree, adapter_names: str | Sequence[str], requires_grad: bool = True) -> Any:
    """The tree in which some adapters are trained while they are active, or are frozen.

    Raises:
        ValueError: if the tree has no adapter of a name, or a name is there twice.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(target_modules=["q"])
        >>> params = pj.apply_lora({"q": {"kernel": jax.numpy.eye(2)}}, config)
        >>> len(jax.tree.leaves(pj.partition(set_requires_grad(params, "default", False))[0]))
        0
    """
    names = _names(params, adapter_names)

    def trained(_: str, leaf: Adapted) -> Adapted:
        return dataclasses.replace(leaf, trainable=requires_grad) if leaf.tag.name in names else leaf

    return map_adapted(trained, params)


def active_adapters(params: PyTree) -> list[str]:
    """The names of the adapters that are active, in the order in which they are applied.

    Example:
        >>> active_adapters({"kernel": jax.numpy.eye(2)})
        []
    """
    on_leaves: dict[str, list[str]] = {}
    for path, leaf in adapted_leaves(params):
        if leaf.active:
            on_leaves.setdefault(path, []).append(leaf.tag.name)
    most_first = sorted(on_leaves.values(), key=len, reverse=True)  # a leaf with several says in which order
    return list(dict.fromkeys(name for names in most_first for name in names))


def disable_adapter(params: PyTree) -> Any:
    """The tree with no adapter active: it computes what its base computes."""
    return map_adapted(lambda _, leaf: dataclasses.replace(leaf, active=False), params)


def delete_adapter(params: PyTree, adapter_name: str) -> Any:
    """The tree without one adapter.

    Raises:
        ValueError: if the tree has no adapter of that name.
    """
    _known(params, adapter_name)

    def drop(_: str, leaf: Adapted) -> Any:
        return leaf.base if leaf.tag.name == adapter_name else leaf

    return map_adapted(drop, params)


def _known(params: PyTree, adapter_name: str) -> None:
    if adapter_name not in (found := adapters(params)):
        raise ValueError(f"No adapter is named '{adapter_name}'. Found: {sorted(found)}.")


def _names(params: PyTree, given: str | Sequence[str]) -> list[str]:
    """One name or several as a list, all of them known and each there once."""
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        _known(params, name)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"Give one adapter's name, or several, each once: got {names}. Found: {sorted(adapters(params))}."
        )
    return names


def _in_order(tree: PyTree, names: Sequence[str]) -> Any:
    """The tree or handle whose leaves have these adapters outside of all others, the first of them innermost."""
    if len(names) < 2:
        return tree
    if isinstance(tree, Handle):
        return tree.replace(_in_order(tree.params, names))

    def sorted_by_name(node: Any) -> Any:
        nodes = list(nested_adapters(node).values())[::-1]  # the innermost first
        if not nodes:
            return node
        base = nodes[0].base
        for one in sorted(nodes, key=lambda one: names.index(one.tag.name) if one.active else -1):
            base = dataclasses.replace(one, base=base)
        return base

    return jax.tree.map(sorted_by_name, tree, is_leaf=is_adapted)
