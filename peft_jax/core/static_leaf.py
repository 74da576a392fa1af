"""Leaves of a tree that are no data, as activation functions of an Equinox model, put into the tree's structure."""

import dataclasses
from functools import partial
from typing import Any

import jax

from peft_jax.core.pytree import PyTree


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("value",))
@dataclasses.dataclass(frozen=True)
class StaticLeaf:
    """A leaf that compiled programs take as a constant."""

    value: Any


def is_static(node: PyTree) -> bool:
    """Whether a node of a tree is such a leaf (for ``is_leaf``)."""
    return isinstance(node, StaticLeaf)


def made_static(tree: PyTree) -> PyTree:
    """The tree with its functions and strings, which no compiled program takes as arguments, in its structure."""

    def wrapped(leaf: Any) -> Any:
        is_data = hasattr(leaf, "dtype") or not (callable(leaf) or isinstance(leaf, str))
        return leaf if is_data else StaticLeaf(leaf)

    return jax.tree.map(wrapped, tree)


def made_leaves(tree: PyTree) -> PyTree:
    """The inverse of `made_static`."""
    return jax.tree.map(lambda node: node.value if is_static(node) else node, tree, is_leaf=is_static)
