"""Trees with adapted leaves: find the leaves, change them, and hand the arrays that several of them share over."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import ADAPTER, LAYER, Adapted, is_adapted, nested_adapters
from peft_jax.core.file_names import check_folder_name
from peft_jax.core.handle import Handle
from peft_jax.core.paths import dotted, matrix_path, module_path
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import only


def map_adapted(change: Callable[[str, Adapted], Any], tree: PyTree) -> Any:
    """A tree or model handle with ``change(leaf path, adapted leaf)`` in place of every adapted leaf, innermost first.

    Paths are those in the tree of parameters, of a handle too. A bias that shares its layer's arrays has the changed
    ones afterwards.
    """
    if isinstance(tree, Handle):
        return tree.replace(map_adapted(change, tree.params))
    return _share_again(_mapped(change, tree))


def _mapped(change: Callable[[str, Adapted], Any], tree: PyTree) -> Any:
    """`map_adapted` of a bare tree, leaf by leaf."""

    def visit(key_path: Any, node: Any) -> Any:
        if not is_adapted(node):
            return node
        return change(dotted(key_path), dataclasses.replace(node, base=visit(key_path, node.base)))

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=is_adapted)


def adapted_leaves(tree: PyTree) -> list[tuple[str, Adapted]]:
    """Path and leaf of everything adapted in a tree or handle, of leaves in each other the innermost first."""
    found: list[tuple[str, Adapted]] = []
    params = tree.params if isinstance(tree, Handle) else tree
    for key_path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted):
        outermost_first = list(nested_adapters(node).values())
        for leaf in reversed(outermost_first):
            found.append((dotted(key_path), leaf))
    return found


def adapters(tree: PyTree) -> dict[str, Any]:
    """Name and config of every adapter in a tree, in order of appearance.

    Example:
        >>> adapters({"kernel": jnp.ones((2, 2))})
        {}
    """
    found: dict[str, Any] = {}
    for _, leaf in adapted_leaves(tree):
        found.setdefault(leaf.tag.name, leaf.tag.config)
    return found


def check_adapter_name(name: str, tree: PyTree) -> None:
    """Raise ValueError unless a tree has no adapter of a name, and its files can go into a folder of that name."""
    if name in adapters(tree):
        raise ValueError(f"Adapter name '{name}' is taken. Choose another, or pj.delete_adapter it first.")
    check_folder_name(name)


def tied(tree: PyTree) -> Any:
    """The tree with arrays that several leaves share taken from the leaf that trains them.

    A method such as IA3 scales a layer's outputs, bias included, by one vector. It is trained in the matrix's leaf;
    that the bias's leaf takes it from there, in every function of the trainable partition, adds the two gradients up.
    Arrays that all leaves of an adapter share, such as VB-LoRA's vectors, are taken from its first leaf alike, and
    those of a group of layers, such as LILY's, from the group's first layer.
    """
    return _shared(tree, lambda before, roles: True)


def _share_again(tree: PyTree) -> Any:
    """`tied`, where a leaf shared arrays of these names before: in a partition they are None, and stay so."""

    def shared_before(before: Mapping[str, Any], roles: Collection[str]) -> bool:
        are_there = all(array is not None for array in before.values())
        return before.keys() == set(roles) and are_there

    return _shared(tree, shared_before)


def _shared(tree: PyTree, shares: Callable[[Mapping[str, Any], Collection[str]], bool]) -> Any:
    """The tree whose leaves have the arrays that they share with another one, where ``shares(before, roles)``."""
    matrices: dict[tuple[str, str], Adapted] = {}
    carriers: dict[str, Adapted] = {}
    leaders: dict[str, dict[int, tuple[Adapted, int]]] = {}
    has_shares = False
    for path, leaf in adapted_leaves(tree):
        has_shares = has_shares or LAYER in leaf.state or ADAPTER in leaf.state
        if LAYER not in leaf.state and leaf.layout.inp:
            matrices[module_path(path), leaf.tag.name] = leaf
        if leaf.tag.places is not None and leaf.tag.role is None:
            of_adapter = leaders.setdefault(leaf.tag.name, {})
            of_adapter |= {number: (leaf, layer) for layer, number in enumerate(leaf.tag.places.own) if number >= 0}
        elif ADAPTER in leaf.state and _carries(leaf):
            carriers[leaf.tag.name] = leaf

    def take(path: str, leaf: Adapted) -> Adapted:
        if LAYER in leaf.state:
            key, source = LAYER, matrices.get((module_path(matrix_path(path, leaf.layout)), leaf.tag.name))
        elif ADAPTER in leaf.state and leaf.tag.places is not None:
            roles = _grouped_roles(leaf)
            if not shares(leaf.state[ADAPTER], roles):
                return leaf
            grouped = {role: _of_leaders(leaf, role, leaders[leaf.tag.name]) for role in roles}
            return dataclasses.replace(leaf, state={**leaf.state, ADAPTER: grouped})
        elif ADAPTER in leaf.state:
            key, source = ADAPTER, carriers.get(leaf.tag.name)
        else:
            return leaf
        if source is None or not shares(leaf.state[key], _shared_roles(leaf, source)):
            return leaf  # in a partition, whose arrays may be None, no shape is asked for
        arrays = _for_bias(source) if key == LAYER else _of_carrier(leaf, source)
        return dataclasses.replace(leaf, state={**leaf.state, key: arrays})

    if not has_shares:
        return tree
    if isinstance(tree, Handle):
        return tree.replace(_mapped(take, tree.params))
    return _mapped(take, tree)


def _carries(leaf: Adapted) -> bool:
    """Whether a leaf has the trained arrays that all leaves of its adapter share itself."""
    return set(leaf.method.carried) <= leaf.params.keys()


def _shared_roles(leaf: Adapted, source: Adapted) -> Collection[str]:
    """The roles of the arrays that a leaf takes from ``source``; none if it is a single layer that has them itself."""
    if LAYER in leaf.state:
        return source.method.bias_roles(source.params)
    return () if _carries(leaf) and not leaf.layout.stack else leaf.method.carried


def _for_bias(source: Adapted) -> dict[str, Any]:
    """The arrays that a bias takes from its layer's matrix, which may be shapes alone."""
    leaves = jax.tree.leaves((source.params, source.state, source.base))
    base = source.unadapted
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in leaves):
        return dict(jax.eval_shape(source.method.for_bias, source.params, source.state, base))
    return source.method.for_bias(source.params, source.state, base)


def _of_carrier(leaf: Adapted, carrier: Adapted) -> dict[str, Any]:
    """The arrays that a leaf takes from the one that has them, for each of its layers."""
    roles = _shared_roles(leaf, carrier)
    if not roles:
        return {}
    before, stack = (0,) * len(carrier.layout.stack), leaf.layout.stack_shape(leaf.shape)

    def spread(array: Any) -> Any:
        whole = (*stack, *array.shape[len(before) :])
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(whole, array.dtype)
        return jnp.broadcast_to(array[before], whole)

    return jax.tree.map(spread, only(carrier.params, roles))


def _grouped_roles(leaf: Adapted) -> list[str]:
    """The roles of the arrays that a leaf takes from the leaders of its groups: all but those of a single leader."""
    assert leaf.tag.places is not None, "it has groups"
    is_single = not leaf.layout.stack
    return [role for role in leaf.method.carried if not (is_single and leaf.tag.places.leads(role)[0])]


def _of_leaders(leaf: Adapted, role: str, leaders: Mapping[int, tuple[Adapted, int]]) -> Any:
    """An array of each of a leaf's layers, from the layers that train it; any where the adapter is not."""
    assert leaf.tag.places is not None, "it has groups"
    numbers = dict(leaf.tag.places.leaders)[role]
    present = next(number for number in numbers if number >= 0)
    found = [leaders.get(number if number >= 0 else present) for number in numbers]
    if any(one is None for one in found):
        raise ValueError(
            f"Adapter '{leaf.tag.name}' has layers that share '{role}' with others, which are not in this tree. Take "
            "the whole tree."
        )
    sources = [one for one in found if one is not None]
    stack = leaf.layout.stack_shape(leaf.shape)

    def of_layer(source: Adapted, layer: int) -> Any:
        depth = len(source.layout.stack)
        array = source.params[role]
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape[depth:], array.dtype)
        return array.reshape(-1, *array.shape[depth:])[layer]

    first, _ = sources[0]
    if all(source is first for source, _ in sources) and not isinstance(first.params[role], jax.ShapeDtypeStruct):
        depth = len(first.layout.stack)
        flat = first.params[role].reshape(-1, *first.params[role].shape[depth:])
        own = flat[np.array([layer for _, layer in sources])]
        return own.reshape(*stack, *own.shape[1:])
    arrays = [of_layer(source, layer) for source, layer in sources]
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*stack, *arrays[0].shape), arrays[0].dtype)
    own = jnp.stack(arrays)
    return own.reshape(*stack, *own.shape[1:])
