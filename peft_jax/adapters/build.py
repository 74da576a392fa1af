"""The one builder of adapted leaves: of fresh adapters, of those from files, of prompts and of combined adapters."""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapters.plan import Target, following_modules, matrices
from peft_jax.core.adapted import ADAPTER, Adapted, Places, Tag
from peft_jax.core.adapted_tree import tied
from peft_jax.core.leaves import replace_leaves
from peft_jax.core.partition_specs import sharded_like_base
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import Weight, as_leaf, as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.grouped_arrays import GroupedArrays
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.shared_arrays import SharedArrays, TrainedSharedArrays


class Contents(NamedTuple):
    """The arrays and the base of an adapted leaf.

    Attributes:
        params: Trained arrays by role, stacked axes first.
        state: Frozen arrays.
        base: The weight that they go on.
        dtypes: Element types of the tensors of a file, by key.
        places: Where the arrays are that groups of layers share.
    """

    params: dict[str, jax.Array]
    state: dict[str, Any]
    base: Weight
    dtypes: Mapping[str, str] = MappingProxyType({})
    places: Places | None = None


ContentsOf = Callable[[Target], Contents]


def build(
    tree: PyTree,
    adapter_name: str,
    config: Method,
    targets: Sequence[Target],
    contents_of: ContentsOf,
    *,
    active: bool = True,
    trainable: bool = True,
) -> Any:
    """The tree with one more adapter.

    Args:
        tree: A tree of parameters.
        adapter_name: The adapter's name, new to the tree.
        config: Its config.
        targets: The leaves that it changes, at their positions in ``tree``.
        contents_of: Gives the arrays of each of them.
        active: Whether it takes part.
        trainable: Whether its arrays are trained.
    """
    nodes = {}
    for target in targets:
        contents = contents_of(target)
        tag = Tag(adapter_name, config, target.role, dict(contents.dtypes), contents.places)
        base = as_leaf(contents.base)
        node = Adapted(base, contents.params, contents.state, target.leaf.layout, tag, active, trainable)
        nodes[target.position] = sharded_like_base(node)
    return tied(replace_leaves(tree, nodes))


def initial_contents(
    config: Method,
    targets: Sequence[Target],
    initialize: Callable[[Target, Weight], tuple[dict[str, jax.Array], dict[str, Any], Weight]],
    key: jax.Array | None = None,
    sizes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> ContentsOf:
    """The contents of a fresh adapter.

    Args:
        config: The adapter's config.
        targets: All leaves that it changes.
        initialize: From a target's matrix to its trained and frozen arrays, and the base that they go on.
        key: For the trained arrays that all leaves share; None stands for seed 0.
        sizes: From `peft_jax.adapters.plan.module_sizes`.
    """
    following = following_modules(targets)
    shared: Mapping[str, jax.Array] = {}
    if isinstance(config, TrainedSharedArrays):
        shared = config.initial(sizes, jax.random.key(0) if key is None else key)
    elif isinstance(config, SharedArrays):
        shared = config.shared(list(sizes.values()))

    def contents_of(target: Target) -> Contents:
        base = as_weight(target.leaf.value, target.leaf.layout)
        if target.role is not None:
            params, state = target.role.init(config, base, target.leaf.names, target.adapted)
            return Contents(params, state, base)
        params, state, base = initialize(target, base)
        biased = not following.isdisjoint(target.leaf.names[target.adapted].flat)
        params, state = dict(params), dict(state)
        for role in config.axes:
            if not config.has_array(role, biased=biased):
                params.pop(role, None)
                state.pop(role, None)
        params |= carried_by(config, target, targets, shared)
        state = state_beside(config, target, following, shared, sizes) | state
        return in_groups(config, target, sizes, Contents(params, state, base))

    return contents_of


def state_beside(
    config: Method,
    target: Target,
    following: Collection[str],
    shared: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """The frozen arrays of a target's matrix that depend on the adapter's other leaves.

    Args:
        config: The adapter's config.
        target: The target.
        following: Names of all modules whose bias follows their matrix.
        shared: The arrays that all layers share.
        sizes: Sizes of the matrices of all target modules, in PyTorch's order.
    """
    leaf, state = target.leaf, dict[str, Any]()
    if isinstance(config, BiasRule):
        state |= config.state_beside_bias(leaf.names, target.adapted, following)
    if isinstance(config, SharedArrays):
        state |= config.share(shared, leaf.layout.sizes(leaf.value.shape), target.adapted.shape)
        state |= config.numbered(sizes, leaf.names, target.adapted, lookup=leaf.layout.lookup)
    return state


def carried_by(
    config: Method, target: Target, targets: Sequence[Target], shared: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The trained arrays that all leaves share, if a target is the first of all ``targets``, which has them."""
    if not isinstance(config, TrainedSharedArrays):
        return {}
    first = matrices(targets)[0]
    return config.carry(shared, target.adapted.shape) if target.position == first.position else {}


def in_groups(config: Method, target: Target, sizes: Mapping[str, tuple[int, int]], contents: Contents) -> Contents:
    """The contents of a matrix whose layers have all arrays, with those that groups of layers share in their first."""
    if not isinstance(config, GroupedArrays):
        return contents
    places = config.places(sizes, target.leaf.names, target.adapted)
    params, leads = dict(contents.params), dict[str, jax.Array]()
    for role in config.carried:
        own = places.leads(role).reshape(target.adapted.shape)
        leads[config.leads(role)] = jnp.asarray(own)
        array = params.pop(role)
        if own.any():
            params[role] = jnp.where(own.reshape(*own.shape, *[1] * (array.ndim - own.ndim)), array, 0)
    state = {**contents.state, **leads, ADAPTER: {}}
    return contents._replace(params=params, state=state, places=places)
