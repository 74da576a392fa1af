"""Put arrays onto devices, and shard an adapter like its base."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core.adapted import Adapted
from peft_jax.core.mesh_axes import dividing
from peft_jax.core.weight import MergeError


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Shard an array; where processes share a mesh, each has the whole array and gives its devices their parts."""
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        key = put(jax.random.key_data(array), NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None)))
        return jax.random.wrap_key_data(key, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def sharded_like_base(leaf: Adapted) -> Adapted:
    """The leaf with its adapter's arrays sharded along the axes that they share with the base; all else replicated.

    They stay where they are if the base is not on a mesh of several devices. Inside a compiled program that is so
    unless the mesh has explicit axes, because no other sharding is known there. Where an inner one of several
    flattened axes is sharded, the adapter is replicated.
    """
    is_traced = isinstance(leaf.array, jax.core.Tracer)
    if is_traced:
        sharding = jax.typeof(leaf.array).sharding
    else:
        sharding = getattr(leaf.array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty or sharding.mesh.size == 1:
        return leaf
    if is_traced and not sharding.mesh.are_all_axes_explicit:
        return leaf
    place = jax.sharding.reshard if is_traced else put
    found = leaf.entries(tuple(sharding.spec))
    spec = (*found, *[None] * (leaf.ndim - len(found)))
    try:
        specs = leaf.specs(spec)
    except MergeError:
        specs = jax.tree.map(lambda _: PartitionSpec(), leaf)
    params, state = jax.tree.map(
        lambda array, spec: place(array, NamedSharding(sharding.mesh, dividing_spec(spec, array.shape, sharding.mesh))),
        (leaf.params, leaf.state),
        (specs.params, specs.state),
    )
    return dataclasses.replace(leaf, params=params, state=state)


def dividing_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The spec without the mesh axes that do not divide an array's axis; of several the last ones are left out.

    An axis that is a part of a base's may be such a one.
    """
    found: list[Any] = []
    for size, axis in zip(shape, spec, strict=False):
        names = (axis,) if isinstance(axis, str) else axis or ()
        found.append(dividing(names, size, mesh.shape) or None)
    return PartitionSpec(*found)
