"""Experts on several devices: each device computes its own experts, for the tokens of the devices beside it.

Tokens are gathered along the axis ``expert`` of the mesh, and the results added up and dealt out again (`jax.shard_map`
with all-gather and reduce-scatter). By the TPU's compiler this takes less memory than the two other ways. By sharding
rules alone it gathers the experts' weights, in the element type of the tokens. An exchange of the rows of each expert
(all-to-all) needs a buffer for the case that all of them go to one device, beside one for sorting them, and moves each
token once for each of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from peft_jax.core.mesh_axes import AXES, BATCH_AXES, EXPERT_AXES, dividing

Tensors = Mapping[str, jax.Array]

# From the experts' tensors, tokens (tokens, hidden), and of each token the factors and the numbers of its experts
# (tokens, k) to the sum of their outputs (tokens, hidden). An expert whose number is too large has no output.
Compute = Callable[[Tensors, jax.Array, jax.Array, jax.Array], jax.Array]


def on_devices_of_experts(
    compute: Compute, tensors: Tensors, x: jax.Array, weights: jax.Array, experts: jax.Array
) -> jax.Array:
    """Compute the experts of tokens on the devices that hold them.

    The mesh is that of ``jax.set_mesh``. Without one, or if it has none of `peft_jax.core.mesh_axes.AXES`, ``compute``
    runs as it is, and the compiler divides the work by the sharding of the arrays.

    Args:
        compute: What one device computes.
        tensors: The experts' tensors, with an axis of experts in front.
        x: Tokens ``(tokens, hidden)``.
        weights: The factors of the chosen experts ``(tokens, k)``.
        experts: Their numbers, int32 ``(tokens, k)``.

    Returns:
        ``(tokens, hidden)``, in the element type of the factors.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set()
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if name in AXES and kind == AxisType.Auto:
            axes.add(name)
    sizes = {name: mesh.shape[name] for name in axes if mesh.shape[name] > 1}
    if not sizes:
        return compute(tensors, x, weights, experts)
    count = len(next(iter(tensors.values())))
    holders = dividing([name for name in EXPERT_AXES if name in sizes], count, sizes)
    dealt = [name for name in BATCH_AXES if name in sizes]
    if dividing(dealt, len(x), sizes) != tuple(dealt):
        dealt = []  # a few tokens, as in generation, are on all devices
    rows, groups = P(tuple(dealt) or None), P(holders or None)
    run = jax.shard_map(
        partial(_on_one_device, compute, holders, [name for name in holders if name in dealt]),
        in_specs=(dict.fromkeys(tensors, groups), rows, rows, rows),
        out_specs=rows,
        axis_names=axes,
        check_vma=False,
    )
    y: jax.Array = run(dict(tensors), x, weights, experts)
    return y


def _on_one_device(
    compute: Compute,
    holders: tuple[str, ...],
    exchanged: list[str],
    tensors: Tensors,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
) -> jax.Array:
    """A device's part of the result.

    Args:
        compute: As in `on_devices_of_experts`, like the last four.
        holders: Axes of the mesh that divide the experts.
        exchanged: Those of them that divide the tokens too.
        tensors: This device's part.
        x: This device's part.
        weights: This device's part.
        experts: This device's part.
    """
    for name in exchanged:
        x, weights, experts = (jax.lax.all_gather(part, name, tiled=True) for part in (x, weights, experts))
    if holders:
        count = len(next(iter(tensors.values())))
        own = experts - count * jax.lax.axis_index(holders)
        experts = jnp.where(own < 0, count, own)
    y = compute(tensors, x, weights, experts)
    for name in holders:
        if name in exchanged:
            y = jax.lax.psum_scatter(y, name, scatter_dimension=0, tiled=True)
        else:
            y = jax.lax.psum(y, name)
    return y
