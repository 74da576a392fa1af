"""Shardings, devices and collectives."""

import functools
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.digits import Atom, Axis
from peft_jax.adapt.rules.base import entries_of, or_merge
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view
from peft_jax.core.weight import MergeError, varying_over

MARK = "marked"  # the entry of a spec for the axis that is asked for


def pvary(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Those arrays of the weight that do not vary yet."""
    return [jax.tree.map(lambda array: varying_over(array, eqn.params["axes"]), values[0])]


def sharding_constraint(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The adapter is constrained as its base."""
    (view,), sharding = values, eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return None
    entries = entries_of(sharding.spec, view)
    for i in eqn.params["unconstrained_dims"]:
        entries[i] = PartitionSpec.UNCONSTRAINED
    specs = view.specs(entries)
    if specs is None:
        return None
    shardings = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs)
    return [jax.lax.with_sharding_constraint(view, shardings)]


def device_put(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """On other devices: the adapter goes with its base, each array by itself, as by `optimization_barrier`."""
    outs: list[Value] = []
    for value, device in zip(values, eqn.params["devices"], strict=True):
        if is_view(value) and isinstance(device, NamedSharding):
            specs = value.specs(entries_of(device.spec, value))
            if specs is None:
                return None
            places = jax.tree.map(functools.partial(NamedSharding, device.mesh), specs)
            outs.append(jax.tree.map(jax.device_put, value, places))
        else:
            outs.append(jax.tree.map(functools.partial(jax.device_put, device=device), value))
    return outs


def reshard(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """On a mesh of explicit axes: the adapter is sharded as its base."""
    (view,), sharding = values, eqn.params["dst_sharding"]
    specs = view.specs(entries_of(sharding.spec, view))
    if specs is None:
        return None
    return [jax.sharding.reshard(view, jax.tree.map(functools.partial(NamedSharding, sharding.mesh), specs))]


def all_gather(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Of a weight that is split over devices each array that is split is gathered, as FSDP does it."""
    (view,), p = values, eqn.params
    axis = view.axis_over(p["axis_name"])
    if axis is None or p["axis_index_groups"] is not None:
        return None
    params = {**p, "tiled": True, "all_gather_dimension": MARK}
    whole = _each_part(view, axis, eqn.replace(params=params), "all_gather_dimension")
    if whole is None:
        return None
    local, at = view.weight.shape[axis], p["all_gather_dimension"]
    devices: Axis = (Atom(axis, local, whole.weight.shape[axis] // local),)
    if p["tiled"]:
        axes = (*view.axes[:at], (*devices, *view.axes[at]), *view.axes[at + 1 :])
    else:
        axes = (*view.axes[:at], devices, *view.axes[at:])
    shards = (*view.shards[:axis], None, *view.shards[axis + 1 :])
    return [whole.replace(axes=axes, shards=shards)]


def ppermute(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Parts of a weight go from device to device: of each array that is split."""
    (view,), p = values, eqn.params
    axis, devices = view.axis_over(p["axis_name"]), range(jax.lax.axis_size(p["axis_name"]))
    if axis is None or sorted(to for _, to in p["perm"]) != list(devices):  # others have zeros afterwards
        return None
    return or_merge(_each_part(view, axis, eqn, None))


def _each_part(view: View, axis: int, eqn: JaxprEqn, dimension: str | None) -> View | None:
    """A view of a weight after a collective of each array that is split along an axis of the weight.

    Args:
        view: The view.
        axis: The weight's axis.
        eqn: The collective.
        dimension: The parameter that is the axis of the array, if there is one.
    """
    entries: list[Any] = [None] * view.weight.ndim
    entries[axis] = MARK
    try:
        specs = view.weight.specs(tuple(entries))
    except MergeError:
        return None

    def collected(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        if MARK not in spec:
            return array
        own = dict(eqn.params)
        if dimension is not None:
            own[dimension] = spec.index(MARK)
        return compat.bind(eqn.replace(params=own), [varying_over(array, _names(own["axis_name"]))])[0]

    return view.replace(weight=jax.tree.map(collected, view.weight, specs))


def _names(axis_name: Any) -> tuple[str, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)
