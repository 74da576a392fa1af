"""An adapter lies on the devices as its base does."""

import dataclasses

import jax
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core.adapted import Adapted
from peft_jax.core.weight import MergeError


def sharded_like_base(leaf: Adapted) -> Adapted:
    """The leaf with its adapter's arrays sharded along the axes that they share with the base; all else replicated.

    A base that is not spread over a mesh leaves them where they are, and so does one inside a compiled program, where
    only a mesh of explicit axes tells how an array lies. Where an inner one of several flattened axes is sharded, the
    adapter is replicated.
    """
    is_traced = isinstance(leaf.array, jax.core.Tracer)
    sharding = jax.typeof(leaf.array).sharding if is_traced else getattr(leaf.array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or sharding.mesh.size == 1:
        return leaf
    if is_traced and not sharding.mesh.are_all_axes_explicit:
        return leaf
    place = jax.sharding.reshard if is_traced else jax.device_put
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    try:
        specs = leaf.specs(spec)
    except MergeError:
        specs = jax.tree.map(lambda _: PartitionSpec(), leaf)
    params, state = jax.tree.map(
        lambda array, spec: place(array, NamedSharding(sharding.mesh, spec)),
        (leaf.params, leaf.state),
        (specs.params, specs.state),
    )
    return dataclasses.replace(leaf, params=params, state=state)
