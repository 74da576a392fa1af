"""The rules: how each primitive runs with a weight among its operands.

A rule takes ``(evaluate, eqn, values)`` and gives the equation's outputs, or None where the weight has to be merged.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.custom_calls import CUSTOM_CALLS, has_derivative_of_body
from peft_jax.adapt.edits import Cut, Pad, Reverse, cuts
from peft_jax.adapt.joined import joined_or_stacked, layers_of
from peft_jax.adapt.view import (
    BROADCAST,
    Atom,
    Axis,
    Value,
    View,
    arrange,
    flat,
    free,
    in_front,
    is_view,
    is_watched,
    length,
    rewatched,
    stands_for_weights,
    through,
)
from peft_jax.core.product import Convolution, Grouped, Lookup, Product
from peft_jax.core.repeated import with_bases, without_bases
from peft_jax.core.scaled import Scaled
from peft_jax.core.weight import MergeError, varying_over

MARK = "marked"  # the entry of a spec for the axis that is asked for

Outputs = list[Value] | None
Evaluate = Callable[..., list[Value]]  # the outputs of a jaxpr on the values that follow it
Rule = Callable[[Evaluate, JaxprEqn, list[Value]], Outputs]


class Side(NamedTuple):
    """The axes of one operand of a product that meet those of the other, and those that both have."""

    contracted: Sequence[int]
    stacked: Sequence[int]


# ---- Uses: products, lookups, convolutions


def dot_general(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A product over all input axes, or with the transpose over all output axes."""
    (left_over, right_over), (left_stack, right_stack) = eqn.params["dimension_numbers"]
    left, right = Side(left_over, left_stack), Side(right_over, right_stack)
    is_left = is_view(values[0])
    if is_left:
        (view, x), own, other = values, left, right
    else:
        (x, view), own, other = values, right, left
    role = view.role(own.contracted, own.stacked)
    if is_view(x):
        x.role(other.contracted, other.stacked)  # for its watch: of two weights both are merged
    if is_view(x) or role is None:
        return None
    if x.dtype != view.dtype:
        if not (is_wide_float(x.dtype) and is_wide_float(view.dtype)):
            return None
        wider = wider_float(x.dtype, view.dtype)  # products of mixed types are computed in it
        x, view = x.astype(wider), view.replace(weight=view.weight.astype(wider))
    shared = dict(zip((*other.stacked, *other.contracted), (*own.stacked, *own.contracted), strict=True))
    have = _axes(x, shared, view)
    of_view, of_x = _without(view.axes, (*own.stacked, *own.contracted)), _without(have, shared)
    want = [view.axes[i] for i in own.stacked]
    want += of_view + of_x if is_left else of_x + of_view
    product = _product(eqn.params, len(of_x), len(want), is_left=is_left)
    if product is None:
        return None
    return _used(eqn, view, through(view, x, have, want, role, product))


def _product(p: Mapping[str, Any], rows: int, ndim: int, *, is_left: bool) -> Product | None:
    """How a dot_general multiplies; None if its result has a sharding that axes joined to one cannot have.

    Args:
        p: Parameters of the equation.
        rows: Axes of the result that are the other operand's.
        ndim: Axes of the result.
        is_left: Whether the weight is the left operand.
    """
    precision = p["precision"]
    if is_left and isinstance(precision, tuple):
        precision = precision[::-1]
    given, sharding = p.get("out_sharding"), None  # given on a mesh of explicit axes
    if given is not None:
        is_stacked = bool(p["dimension_numbers"][1][0])
        entries = [*given.spec, *[None] * (ndim - len(given.spec))]
        if is_stacked or is_left or any(entry is not None for entry in entries[rows + 1 :]):
            return None
        sharding = NamedSharding(given.mesh, PartitionSpec(*entries[: rows + 1]))
    return Product(precision, p["preferred_element_type"], sharding)


def ragged_dot(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Rows in groups, each with its own layer of the weight."""
    p, (x, view, group_sizes) = eqn.params, values
    numbers = p["ragged_dot_dimension_numbers"]
    usual = (numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions) == ((((1,), (1,)), ((), ())), (0,))
    if not usual or is_view(x) or is_view(group_sizes) or view.role([1], [0]) != "in" or x.dtype != view.dtype:
        return None
    layout, row = view.weight.layout, free(0, len(x))
    if view.stack_position(0) is None or len(layout.stack) > 1 or view.edits:
        return None
    product = Grouped(p["precision"], p["preferred_element_type"], group_sizes=group_sizes)
    y = view.weight.apply(arrange(x, [*row, *view.axes[1]], [row, view.digits(layout.inp)]), product)
    return _used(eqn, view, arrange(y, [*row, *view.digits(layout.out)], [row, view.axes[2]]))


def gather(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A lookup of whole rows."""
    p, (view, indices), numbers = eqn.params, values, eqn.params["dimension_numbers"]
    stack, gone = numbers.operand_batching_dims, numbers.collapsed_slice_dims
    rows = []
    for i, n in enumerate(view.shape):
        if i not in stack and (i in gone or p["slice_sizes"][i] != n):
            rows.append(i)
    if is_view(indices) or not rows:
        return None
    if len(rows) > 1:
        return chosen_by_several(view, indices, eqn, rows)
    if view.role(rows, stack, looks_up=True) != "in":
        return chosen_layers(view, indices, eqn, rows[0])
    if not _looks_up(p, rows[0]):
        return None
    ids = indices[..., numbers.start_index_map.index(rows[0])]
    have = _axes(ids, dict(zip(numbers.start_indices_batching_dims, stack, strict=True)), view)
    left: list[Axis] = []
    for i, axis in enumerate(view.axes):
        if i not in (*gone, *stack):
            left.append(() if i in rows else axis)
    of_view, of_ids, want = iter(left), iter(have), []
    for i in range(len(have) + len(left)):
        want.append(next(of_view if i in numbers.offset_dims else of_ids))
    options = tuple((name, p[name]) for name in ("unique_indices", "indices_are_sorted", "mode", "fill_value"))
    return _used(
        eqn, view, through(view, ids, have, want, "in", Lookup(options=options, untrained_row=view.untrained_row))
    )


def _looks_up(p: Mapping[str, Any], row: int) -> bool:
    """Whether a gather takes single rows, and fills with what a sum of products can be."""
    fill, clips = p["fill_value"], p["mode"] == jax.lax.GatherScatterMode.CLIP  # which makes all other indices 0
    only = p["dimension_numbers"].start_index_map == (row,)
    return p["slice_sizes"][row] == 1 and (only or clips) and (fill is None or fill == 0 or fill != fill)


def chosen_layers(view: View, indices: jax.Array, eqn: JaxprEqn, axis: int) -> Outputs:
    """Whole matrices of a stack, by one index or several: the arrays of the weight are taken as the matrices are."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    is_choice = p["slice_sizes"][axis] == 1 and numbers.start_index_map == (axis,) and not numbers.operand_batching_dims
    fill = p["fill_value"]
    if not is_choice or len(view.shape) < 3 or not (fill is None or fill != fill):
        return None
    taken = taken_layers(view, indices[..., 0], eqn, axis)
    if taken is None:
        return None
    if axis not in numbers.collapsed_slice_dims:
        at = indices.ndim - 1 + axis
        taken = taken.replace(axes=(*taken.axes[:at], (), *taken.axes[at:]))
    return [in_place(taken, indices.ndim - 1, numbers)]


def taken_layers(view: View, ids: jax.Array, eqn: JaxprEqn, axis: int) -> View | None:
    """The layers of a stack at some indices, whose axes are in front of the others; None if they have to be merged."""
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP

    def take(array: jax.Array, along: int) -> jax.Array:
        has_nan = jnp.issubdtype(array.dtype, jnp.inexact)
        return jnp.take(array, ids.reshape(-1), along, mode="fill" if fills and has_nan else "clip")

    taken = view.mapped(axis, take, drop=False)
    if taken is None:
        return None
    taken = taken.reshaped((*view.shape[:axis], *ids.shape, *view.shape[axis + 1 :]))
    if taken is None:
        return None
    of_ids = taken.axes[axis : axis + ids.ndim]
    return taken.replace(axes=(*of_ids, *taken.axes[:axis], *taken.axes[axis + ids.ndim :]))


def in_place(taken: View, count: int, numbers: jax.lax.GatherDimensionNumbers) -> View:
    """A view whose first axes are those of the indices, with its axes where a gather has them."""
    of_ids, of_view = iter(taken.axes[:count]), iter(taken.axes[count:])
    axes: list[Axis] = []
    for i in range(len(taken.axes)):
        axes.append(next(of_view if i in numbers.offset_dims else of_ids))
    return taken.replace(axes=tuple(axes))


def chosen_by_several(view: View, indices: jax.Array, eqn: JaxprEqn, rows: Sequence[int]) -> Outputs:
    """Whole matrices of a stack of stacks, by an index along each: ``w[i, j]`` of a layer and an expert."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    first, fill = rows[0], p["fill_value"]
    are_beside = list(rows) == list(range(first, first + len(rows)))
    is_choice = numbers.collapsed_slice_dims == numbers.start_index_map == tuple(rows)
    if not (are_beside and is_choice) or numbers.operand_batching_dims or not (fill is None or fill != fill):
        return None
    joined: View | None = view
    for _ in rows[1:]:
        joined = None if joined is None else joined.joined(first)
    if joined is None:
        return None
    ids = jnp.zeros(indices.shape[:-1], indices.dtype)
    is_inside = jnp.ones(ids.shape, bool)
    for i, axis in enumerate(rows):
        own = jnp.clip(indices[..., i], 0, view.shape[axis] - 1)
        ids, is_inside = ids * view.shape[axis] + own, is_inside & (own == indices[..., i])
    if p["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        ids = jnp.where(is_inside, ids, joined.shape[first])
    taken = taken_layers(joined, ids, eqn, first)
    return None if taken is None else [in_place(taken, ids.ndim, numbers)]


def convolution(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A convolution whose kernel is the weight."""
    p, (x, view) = eqn.params, values
    if is_view(view) and view.watch is not None:
        view.watch.kernel(view, p["dimension_numbers"].rhs_spec[2:], p["feature_group_count"])
    (out, *rest), channels = p["dimension_numbers"].rhs_spec, p["dimension_numbers"].out_spec[1]
    if is_view(x) or not is_view(view) or view.role(rest) != "in" or view.weight.layout.stack:
        return None
    if p["batch_group_count"] > 1 or view.axes[out] != view.digits(view.weight.layout.out) or x.dtype != view.dtype:
        return None
    layout, groups = view.weight.layout, p["feature_group_count"]
    if layout.taps and layout.groups != groups:
        raise ValueError(
            f"A kernel of shape {view.shape} is that of a convolution of {groups} groups, and its layout says "
            f"{layout.groups}. Write groups={groups} in its Layout."
        )
    product = Convolution(
        p["precision"],
        p["preferred_element_type"],
        kernel=functools.partial(view.as_kernel, out),
        bind=functools.partial(eqn.primitive.bind, **p),
        groups=groups,
        rows=layout.sizes(view.weight.shape)[0],
        in_axis=rest[0],
        out_axis=out,
        channel_axis=channels,
    )
    return _used(eqn, view, jnp.moveaxis(view.weight.apply(x, product), -1, channels))


def _axes(x: jax.Array, shared: Mapping[int, int], view: View) -> list[Axis]:
    """The axes of the other operand: the weight's where they share them, else its own."""
    axes = []
    for i, n in enumerate(x.shape):
        axes.append(view.axes[shared[i]] if i in shared else free(i, n))
    return axes


def _without(axes: Sequence[Axis], gone: Collection[int]) -> list[Axis]:
    return [axis for i, axis in enumerate(axes) if i not in gone]


def _used(eqn: JaxprEqn, view: View, y: jax.Array | None) -> Outputs:
    if y is None:
        return None
    view.done(eqn, merged=False)
    return [y.astype(compat.type_of(eqn.outvars[0]).dtype)]


def elementwise(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A matrix times a number; a vector that each row has its own of; others are merged."""
    if eqn.primitive.name in ("mul", "div"):
        product = _times_number(eqn, values)
        if product is not None:
            return [product]
    shape = compat.type_of(eqn.outvars[0]).shape
    rows = {}
    for i, value in enumerate(values):
        own = value.by_row(shape) if is_view(value) else None
        if own is not None:
            rows[i] = own
    if not rows:
        return None
    operands = []
    for i, value in enumerate(values):
        if i in rows:
            value.done(eqn, merged=False)
            operands.append(rows[i])
        else:
            operands.append(merged(value, eqn))
    return compat.bind(eqn, operands)


def _times_number(eqn: JaxprEqn, values: Sequence[Value]) -> View | None:
    """A matrix times a number, or by one; None of anything else."""
    left, right = values
    if is_view(left) and is_view(right):
        return None
    view, number = (left, right) if is_view(left) else (right, left)
    if jnp.size(number) != 1 or (eqn.primitive.name == "div" and view is right):
        return None
    factor = jnp.asarray(number).reshape(()).astype(wider_float(view.dtype, jnp.dtype(jnp.float32)))
    return scaled(view, 1 / factor if eqn.primitive.name == "div" else factor)


def negative(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A matrix times -1."""
    return _or_merge(scaled(values[0], jnp.float32(-1)))


def scaled(view: View, factor: jax.Array) -> View | None:
    """A matrix times a number; None if the weight is a vector, of which a scaled copy costs nothing."""
    if is_probe(view) and len(view.shape) > 1:
        return view
    return view.replace(weight=Scaled.of(view.weight, factor)) if view.weight.layout.inp else None


# ---- Moves: another view of the same weight


def transpose(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Axes in another order."""
    (view,) = values
    return [view.replace(axes=tuple(view.axes[i] for i in eqn.params["permutation"]))]


def reshape(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Axes split and joined."""
    return _or_merge(values[0].reshaped(eqn.params["new_sizes"]))


def squeeze(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Without some axes of length 1."""
    (view,) = values
    return [view.replace(axes=tuple(_without(view.axes, eqn.params["dimensions"])))]


def reduce_sum(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A sum over axes of length 1, as `jnp.einsum` makes it, takes them away."""
    (view,) = values
    if any(view.shape[axis] != 1 for axis in eqn.params["axes"]):
        return None
    return [view.replace(axes=tuple(_without(view.axes, eqn.params["axes"])))]


def broadcast_in_dim(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """With axes added along which nothing changes."""
    view, shape, at = values[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    earlier = [atom.stride for atom in flat(view.axes) if atom.axis == BROADCAST]
    number = 1 + max(earlier, default=0)
    axes: list[Axis] = []
    for i, n in enumerate(shape):
        axes.append(() if n == 1 else (Atom(BROADCAST, number + i, n),))
    for i, axis in zip(at, view.axes, strict=True):
        if length(axis) == shape[i]:
            axes[i] = axis
    return [view.replace(axes=tuple(axes))]


def convert_element_type(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """In another floating-point type; one of 8 bits is meant to round the merged weight."""
    view, dtype = values[0], eqn.params["new_dtype"]
    if not is_wide_float(dtype):
        return None
    return [view.replace(weight=view.weight.astype(dtype))]


def is_wide_float(dtype: jnp.dtype) -> bool:
    """Whether an element type is a floating-point one of at least 16 bits."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16)


def wider_float(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """The wider of two floating-point types; float32 for bfloat16 and float16."""
    bits_a, bits_b = jnp.finfo(a).bits, jnp.finfo(b).bits
    if bits_a == bits_b and a != b:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(a if bits_a >= bits_b else b)


def slice_(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Some of the stacked layers, or a part of the inputs or the outputs."""
    view, p = values[0], eqn.params
    limits = zip(p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(view.shape), strict=True)
    for i, limit in enumerate(limits):
        if view is not None and limit != (0, view.shape[i], 1):
            view = _edited(view, i, Cut(*map(int, limit)))
    return _or_merge(view)


def split(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Slices side by side."""
    axis, parts = eqn.params["axis"], []
    for cut in cuts(eqn.params["sizes"]):
        part = _edited(values[0], axis, cut)
        if part is None:
            return None
        parts.append(part)
    return parts


def reverse(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Some axes backwards."""
    view = values[0]
    for axis in eqn.params["dimensions"]:
        if view is not None and view.shape[axis] != 1:
            view = _edited(view, axis, Reverse())
    return _or_merge(view)


def pad(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Zeros around a matrix, or between its entries."""
    view, fill = values
    if is_view(fill) or isinstance(fill, jax.core.Tracer) or fill != 0:
        return None
    for axis, config in enumerate(eqn.params["padding_config"]):
        numbers = tuple(map(int, config))
        if view is not None and numbers != (0, 0, 0):
            view = _edited(view, axis, Pad(*numbers))
    return _or_merge(view)


def _edited(view: View, axis: int, operation: Cut | Reverse | Pad) -> View | None:
    """A view with an operation done along an axis: to the arrays of stacked layers, or to products.

    Layers of zeros are not added: not every method has a zero.
    """
    has_zeros = isinstance(operation, Pad) and not is_probe(view)
    layers = None if has_zeros else view.mapped(axis, operation.along, drop=False)
    return view.edited(axis, operation) if layers is None else layers


def is_probe(view: View) -> bool:
    """Whether the axes of a weight are unknown, so that its shapes alone are asked for."""
    return not (view.weight.layout.inp or view.weight.layout.out)


def dynamic_slice(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Some of the stacked layers, from a computed one on; or a lookup of one row."""
    view, *starts = values
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(view.shape) if sizes[i] != n]
    if any(map(is_view, starts)):
        return None
    layers: View | None = view
    for axis in cut:
        some_layers = functools.partial(_from_computed, start=starts[axis], size=sizes[axis])
        layers = None if layers is None else layers.mapped(axis, some_layers, drop=False)
    if layers is not None or len(cut) > 1:
        return _or_merge(layers)
    (axis,) = cut
    if sizes[axis] != 1 or view.role(cut, looks_up=True) != "in":
        return None
    want = [*view.axes[:axis], (), *view.axes[axis + 1 :]]
    return _used(eqn, view, through(view, starts[axis], [], want, "in", Lookup(options=(("mode", "clip"),))))


def _from_computed(array: jax.Array, axis: int, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def on_each_array(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The same for all arrays of the weight."""
    return [jax.tree.map(lambda array: compat.bind(eqn, [array])[0], values[0])]


def untrained_row(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The lookup that follows leaves out the row's gradient; rows are counted in the whole table."""
    (view,) = values
    if view.edits:
        return None
    return [view.replace(untrained_row=eqn.params["row"])]


def pvary(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Those arrays of the weight that do not vary yet."""
    return [jax.tree.map(lambda array: varying_over(array, eqn.params["axes"]), values[0])]


def optimization_barrier(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A weight's arrays have a barrier each: one for all would give the frozen base a gradient."""
    others = iter(jax.lax.optimization_barrier([value for value in values if not is_view(value)]))
    outs = []
    for value in values:
        outs.append(jax.tree.map(jax.lax.optimization_barrier, value) if is_view(value) else next(others))
    return outs


def sharding_constraint(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The adapter is constrained as its base."""
    (view,), sharding = values, eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return None
    entries = _entries(sharding.spec, view)
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
            specs = value.specs(_entries(device.spec, value))
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
    specs = view.specs(_entries(sharding.spec, view))
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
    return _or_merge(_each_part(view, axis, eqn, None))


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


def _or_merge(view: View | None) -> Outputs:
    return None if view is None else [view]


def _entries(spec: PartitionSpec, value: Value) -> list[Any]:
    """Entries of a spec, one for each axis of a value."""
    return [*spec, *[None] * (len(value.shape) - len(spec))]


# ---- Calls and loops: the weight goes inside


def jit(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A nested ``jit`` stays one, unless a weight is watched: the watch has to see each call."""
    inner = [rewatched(value, lambda watch: watch.inside(eqn)) for value in values]
    has_pad = any(one.primitive.name == "pad" for one in compat.closed(eqn.params["jaxpr"]).eqns)
    if any(map(is_watched, values)) or has_pad:  # a pad needs to see that what it is given is 0
        return evaluate(eqn.params["jaxpr"], *inner)
    donated = []
    for is_donated, value in zip(eqn.params["donated_invars"], values, strict=True):
        # A weight's arrays are the caller's, even where the program's own copy of the weight could be donated.
        donated.append(is_donated and not stands_for_weights(value))
    run = evaluate
    if any(compat.out_shardings(eqn)):
        run = functools.partial(_merging_outputs, evaluate)
    outs: list[Value] = compat.jit_again(run, eqn, tuple(donated))(*values)
    return outs


def _merging_outputs(evaluate: Evaluate, jaxpr: Jaxpr, *values: Value) -> list[jax.Array]:
    """The outputs of a jaxpr, merged."""
    return [merged(value, None) for value in evaluate(jaxpr, *values)]


def checkpoint(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """``jax.checkpoint`` stays, with its policy."""
    p, inner = eqn.params, functools.partial(evaluate, eqn.params["jaxpr"])
    return jax.checkpoint(inner, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


def custom_call(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A function with a derivative of its own is what its body is, if the derivative is that of the body."""
    if not has_derivative_of_body(eqn):
        return None
    inner = [rewatched(value, lambda watch: watch.inside(eqn)) for value in values]
    return evaluate(eqn.params["call_jaxpr"], *inner)


def scan(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Stacked weights are sliced layer by layer; constants and the bases of repeated layers are closed over."""
    parts = compat.scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    if any(is_watched(value) and layers_of(value) for value in values[start:]):
        return _watched_scan(evaluate, eqn, parts, values)
    consts = values[: parts.num_consts]
    init = [merged(value, eqn) for value in values[parts.num_consts : start]]
    single: dict[int, View] = {}  # weights with an axis of length 1 in front, which is gone in the body
    moved: list[Value] = []
    for place, value in enumerate(values[start:]):
        alone = _single(value)
        if alone is None:
            moved.append(_in_front(value, eqn))
        else:
            single[place] = alone
            moved.append(None)
    xs, bases = without_bases(moved)

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        layers = with_bases(sliced, bases)
        for place, value in single.items():
            layers[place] = value
        out = [merged(value, eqn) for value in evaluate(parts.body, *consts, *carry, *layers)]
        return out[: parts.num_carry], out[parts.num_carry :]

    carry, ys = jax.lax.scan(body, init, xs, length=parts.length, reverse=parts.reverse, unroll=parts.unroll)
    return [*carry, *ys]


def _watched_scan(evaluate: Evaluate, eqn: JaxprEqn, parts: compat.Scan, values: list[Value]) -> list[Value]:
    """A scan over watched weights that would be stacked for it: each of them is seen in the body."""
    start = parts.num_consts + parts.num_carry
    xs = values[start:]
    for i in range(parts.length):
        sliced: list[Value] = []
        for value in xs:
            layers = layers_of(value)
            if layers is not None:
                sliced.append(layers[i])
            elif (alone := _single(value)) is not None:
                sliced.append(alone)
            else:
                moved = _in_front(value, eqn)
                sliced.append(jax.tree.map(lambda array, i=i: array[i], moved))
        carry = [merged(value, eqn) for value in values[parts.num_consts : start]]
        outs = evaluate(parts.body, *values[: parts.num_consts], *carry, *sliced)
        for value in outs:
            merged(value, eqn)
    return [jnp.zeros(compat.type_of(var).shape, compat.type_of(var).dtype) for var in eqn.outvars]


def _single(value: Value) -> View | None:
    """A weight without its first axis, if that has length 1 and is no stacked one."""
    if not is_view(value) or value.axes[0] or value.stack_position(0) is not None:
        return None
    return value.replace(axes=value.axes[1:])


def _in_front(value: Value, eqn: JaxprEqn) -> Value:
    """A value for a scan to slice: of a stacked weight the layers are in front, under the layout of one."""
    moved = value.mapped(0, in_front, drop=True) if is_view(value) else value
    return merged(value, eqn) if moved is None else moved


def while_loop(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Weights that the loop does not change are closed over."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = [merged(value, eqn) for value in values[n_cond + n_body :]]

    def proceed(carry: list[jax.Array]) -> jax.Array:
        return evaluate(p["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry: list[jax.Array]) -> list[jax.Array]:
        return [merged(value, eqn) for value in evaluate(p["body_jaxpr"], *body_consts, *carry)]

    return jax.lax.while_loop(proceed, body, init)


def cond(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Each branch sees the weights."""
    index, *operands = values

    def branch(jaxpr: Jaxpr, *operands: Value) -> list[jax.Array]:
        return [merged(value, eqn) for value in evaluate(jaxpr, *operands)]

    branches = [functools.partial(branch, jaxpr) for jaxpr in eqn.params["branches"]]
    platforms = compat.platforms_of(eqn)
    if platforms is not None:  # a choice that is made before compilation has to stay one
        return list(platform_dependent(platforms, branches, operands))
    outs: list[Value] = jax.lax.switch(merged(index, eqn), branches, *operands)
    return outs


def platform_dependent(
    platforms: Sequence[Sequence[str] | None], branches: Sequence[Callable[..., Any]], operands: Sequence[Value]
) -> Any:
    """The branch of the platform that the program is compiled for; ``None`` among the platforms is all others."""
    own: dict[str, Callable[..., Any]] = {}
    default = None
    for names, branch in zip(platforms, branches, strict=True):
        if names is None:
            default = branch
        else:
            own |= dict.fromkeys(names, branch)
    return jax.lax.platform_dependent(*operands, default=default, **own)


def shard_map(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Each device sees its part of base and adapter."""
    parts = compat.shard_map_parts(eqn)
    specs = []
    if any(stands_for_weights(value) and not is_view(value) for value in values):
        return None
    for value, spec in zip(values, parts.in_specs, strict=True):
        specs.append(value.specs(_entries(spec, value)) if is_view(value) else spec)
    if any(spec is None for spec in specs):
        return None

    def body(*local: Value) -> list[jax.Array]:
        inner = []
        for value, spec in zip(local, parts.in_specs, strict=True):
            inner.append(value.part(_entries(spec, value)) if is_view(value) else value)
        return [merged(value, eqn) for value in evaluate(parts.body, *inner)]

    outs: list[Value] = parts.again(body, in_specs=tuple(specs))(*values)
    return outs


def merged(value: Value, eqn: JaxprEqn | None) -> jax.Array:
    """A value as an array; ``eqn`` is the equation that needs one, None the program's end.

    Raises:
        MergeError: if merging would change what is computed.
    """
    if not stands_for_weights(value):
        return value
    value.done(eqn, merged=True)
    try:
        array: jax.Array = value.dense()
    except MergeError as error:
        what = "The program's output is" if eqn is None else f"Primitive '{eqn.primitive.name}' takes"
        raise MergeError(f"{what} a weight that has to be merged. {error}") from None
    return array


# The weights go inside of these.
CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", *CUSTOM_CALLS, "scan", "while", "cond", "shard_map")

RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "gather": gather,
    "conv_general_dilated": convolution,
    **dict.fromkeys(("add", "sub", "mul", "div"), elementwise),
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "reduce_sum": reduce_sum,
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "neg": negative,
    "concatenate": joined_or_stacked,
    "stack": joined_or_stacked,
    "slice": slice_,
    "split": split,
    "rev": reverse,
    "pad": pad,
    "dynamic_slice": dynamic_slice,
    "copy": lambda evaluate, eqn, values: values,
    "name": lambda evaluate, eqn, values: values,  # jax.ad_checkpoint.checkpoint_name
    "stop_gradient": on_each_array,
    "untrained_row": untrained_row,
    "device_put": device_put,
    "reshard": reshard,
    "all_gather": all_gather,
    "all_gather_invariant": all_gather,
    "ppermute": ppermute,
    "pvary": pvary,
    "pcast": pvary,
    "optimization_barrier": optimization_barrier,
    "sharding_constraint": sharding_constraint,
    "jit": jit,
    "pjit": jit,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    **dict.fromkeys(CUSTOM_CALLS, custom_call),
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "shard_map": shard_map,
}
