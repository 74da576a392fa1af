"""Trainable and frozen partitions of a tree, and the masks and labels that optax takes over the trainable one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from peft_jax.core.adapted import ADAPTER, LAYER, is_adapted
from peft_jax.core.adapted_tree import adapted_leaves, tied
from peft_jax.core.pytree import PyTree
from peft_jax.core.static_leaf import made_leaves, made_static
from peft_jax.core.weight import is_weight

SHARED = "shared"  # an array that is in neither partition at its place: `combine` takes it from the leaf that trains it


def partition(params: PyTree) -> tuple[Any, Any]:
    """Split a tree into two partitions: the arrays that are trained, and all others.

    Gradients are taken with respect to the first partition alone, so that no frozen weight has a gradient.

    Args:
        params: Any pytree, or a model handle. Trained are the arrays of active adapters attached for training.

    Returns:
        ``(trainable, frozen)``, each of ``params``'s structure with None where the other has the leaf. Functions and
        strings among the leaves, which compiled programs do not take, are constants in the structure of both.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> trainable, frozen = partition(params)
        >>> [leaf.shape for leaf in jax.tree.leaves(trainable)]
        [(4, 2), (2, 4)]
    """
    params = made_static(params)
    mask = _trained(params)
    trainable = jax.tree.map(lambda trained, leaf: leaf if trained is True else None, mask, params)
    frozen = jax.tree.map(lambda trained, leaf: leaf if trained is False else None, mask, params)
    return trainable, frozen


def combine(trainable: PyTree, frozen: PyTree) -> Any:
    """The inverse of `partition`: the same structure, the same array objects.

    Adapter names and configs come from ``frozen``, which does not pass through compiled programs.

    Raises:
        ValueError: if the partitions do not belong to one tree.
    """
    pick = lambda kept, trained: trained if kept is None else kept  # noqa: E731
    return made_leaves(tied(jax.tree.map(pick, frozen, trainable, is_leaf=lambda leaf: leaf is None)))


def trainable_mask(trainable: PyTree, roles: tuple[str, ...] | None = None) -> Any:
    """A tree of booleans over the trainable partition, for ``optax.masked``: True everywhere, or for some roles only.

    Use it over the trainable partition, never over the whole tree: there ``optax.masked`` passes the gradients of what
    it masks through unchanged, and the base would move.

    Args:
        trainable: The first result of `partition`.
        roles: Names of the arrays to select, as `trainable_labels` gives them; None for all.

    Raises:
        ValueError: if a role names no array, or the tree is the whole one.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
        >>> jax.tree.leaves(trainable_mask(pj.partition(params)[0], roles=("lora_B",)))
        [False, True]
    """
    labels = trainable_labels(trainable)
    found = set(jax.tree.leaves(labels))
    if missing := set(roles or ()) - found:
        raise ValueError(f"Roles {sorted(missing)} name no trainable array. Found: {sorted(found)}.")
    return jax.tree.map(lambda label: roles is None or label in roles, labels)


def trainable_labels(trainable: PyTree) -> Any:
    """The role of each trainable array (``lora_A``, ``lora_B``, ``bias``, ...), for ``optax.partition``.

    Raises:
        ValueError: if the tree is not the trainable partition but the whole one.

    Example:
        A LoRA+ optimizer (Hayou et al., 2024, https://arxiv.org/abs/2402.12354), whose B learns 16 times faster:

        >>> import optax
        >>> plus = optax.partition({"lora_A": optax.adamw(1e-4), "lora_B": optax.adamw(16e-4)}, trainable_labels)
    """
    return _relabel(trainable, lambda leaf, role: role)


def count_parameters(params: PyTree) -> tuple[int, int]:
    """Numbers of trained and of all elements, padding of smaller ranks and unadapted layers not counted.

    A tied, repeated or replaced weight counts as often as it is stored, as PEFT counts it.
    """
    trained, total = 0, 0
    for leaf in jax.tree.leaves(params, is_leaf=is_weight):
        if is_weight(leaf):
            total += math.prod(leaf.stored_shape)
        elif hasattr(leaf, "shape"):
            total += math.prod(leaf.shape)
    for _, leaf in adapted_leaves(params):
        size = int(np.sum(leaf.method.sizes(leaf.params, leaf.state)))
        total += size
        trained += size if leaf.active and leaf.trainable else 0
    return trained, total


def _trained(params: PyTree) -> Any:
    shared = (LAYER, ADAPTER)

    def filled(tree: PyTree, value: Any) -> Any:
        return jax.tree.map(lambda _: value, tree)

    def mask(node: Any) -> Any:
        if not is_adapted(node):
            return filled(node, False)
        return dataclasses.replace(
            node,
            base=mask(node.base),
            params=dict.fromkeys(node.params, node.active and node.trainable),
            state={name: filled(part, SHARED if name in shared else False) for name, part in node.state.items()},
        )

    return jax.tree.map(mask, params, is_leaf=is_adapted)


def _relabel(trainable: PyTree, label: Callable[[Any, str], Any]) -> Any:
    """``trainable`` with ``label(leaf, role)`` for every array; arrays outside adapters have the role ``params``."""

    def visit(node: Any) -> Any:
        if not is_adapted(node):
            return jax.tree.map(lambda leaf: label(leaf, "params"), node)
        if jax.tree.leaves(node.state) or not is_adapted(node.base) and jax.tree.leaves(node.base):
            raise ValueError(
                "This is the whole tree, and an optimizer over it would train the base. Give the trainable partition: "
                "trainable, frozen = pj.partition(params)."
            )
        named = {role: None if leaf is None else label(leaf, role) for role, leaf in node.params.items()}
        return dataclasses.replace(node, base=visit(node.base), params=named)

    return jax.tree.map(visit, trainable, is_leaf=is_adapted)
