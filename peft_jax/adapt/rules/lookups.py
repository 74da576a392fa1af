"""Rows of a table, and whole matrices of a stack, by an index."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.adapt.digits import Axis
from peft_jax.adapt.multiply import through
from peft_jax.adapt.rules.base import or_merge, used
from peft_jax.adapt.rules.products import operand_axes
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view
from peft_jax.core.product import Lookup


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
    have = operand_axes(ids, dict(zip(numbers.start_indices_batching_dims, stack, strict=True)), view)
    left: list[Axis] = []
    for i, axis in enumerate(view.axes):
        if i not in (*gone, *stack):
            left.append(() if i in rows else axis)
    of_view, of_ids, want = iter(left), iter(have), []
    for i in range(len(have) + len(left)):
        want.append(next(of_view if i in numbers.offset_dims else of_ids))
    options = tuple((name, p[name]) for name in ("unique_indices", "indices_are_sorted", "mode", "fill_value"))
    return used(
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
    has_one_index = numbers.start_index_map == (axis,) or p["mode"] == jax.lax.GatherScatterMode.CLIP
    is_choice = p["slice_sizes"][axis] == 1 and has_one_index and not numbers.operand_batching_dims
    fill = p["fill_value"]
    if not is_choice or len(view.shape) < 3 or not (fill is None or fill != fill):
        return None
    taken = taken_layers(view, indices[..., numbers.start_index_map.index(axis)], eqn, axis)
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
        return or_merge(layers)
    (axis,) = cut
    if sizes[axis] != 1 or view.role(cut, looks_up=True) != "in":
        return None
    want = [*view.axes[:axis], (), *view.axes[axis + 1 :]]
    return used(eqn, view, through(view, starts[axis], [], want, "in", Lookup(options=(("mode", "clip"),))))


def _from_computed(array: jax.Array, axis: int, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
