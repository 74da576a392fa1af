"""Several weights side by side, as fused projections are: a product with them is a product with each.

Weights that are stacked become one weight with a stacked axis where their arrays have one shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.digits import EDITED, Axis
from peft_jax.adapt.view import Evaluate, Joined, Outputs, Value, View, is_view, is_watched
from peft_jax.core.pytree import PyTree

PER_PART = ("convert_element_type", "copy", "name", "neg", "mul", "div", "stop_gradient", "pvary", "pcast")


def joined_or_stacked(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """``concatenate`` and ``stack`` of weights alone; beside other arrays they are merged."""
    if not all(map(is_view, values)):
        return None
    is_stack = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if is_stack else "dimension"]
    parts: list[View] = []
    for view in values:
        parts.append(view.replace(axes=(*view.axes[:axis], (), *view.axes[axis:])) if is_stack else view)
    if len(parts) == 1:
        return parts
    are_layers = all(part.shape[axis] == 1 for part in parts)
    watched = any(map(is_watched, parts))
    if are_layers and not watched and can_be_stacked(parts):
        return [_stacked(parts, axis)]
    return [Joined(tuple(parts), axis)]


def can_be_stacked(parts: Sequence[View]) -> bool:
    """Whether the weights have the same arrays and are seen in the same way."""
    first = _kind(parts[0])
    return all(_kind(part) == first for part in parts)


def _kind(part: View) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(part.replace(watch=None))
    types = tuple((leaf.shape, leaf.dtype, jax.typeof(leaf).sharding) for leaf in leaves)
    return structure, types


def _stacked(parts: Sequence[View], axis: int) -> View:
    """Weights of one kind as the layers of one, along an axis of length 1 of each."""

    def moved(one: Axis) -> Axis:
        return tuple(atom._replace(axis=atom.axis + (0 <= atom.axis < EDITED)) for atom in one)

    layout = parts[0].weight.layout
    weights = [part.weight for part in parts]
    whole = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights).relaid(layout.stacked())
    first = parts[0]
    new = View.of(whole).axes[0]
    axes = [moved(one) for one in first.axes]
    axes[axis] = new
    edits = [edit._replace(source=moved(edit.source)) for edit in first.edits]
    return first.replace(weight=whole, axes=tuple(axes), edits=tuple(edits))


def run_joined(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The outputs of an equation with weights side by side among its operands; None where they have to be merged."""
    name, places = eqn.primitive.name, [i for i, value in enumerate(values) if isinstance(value, Joined)]
    if len(places) != 1:
        return None
    (place,) = places
    joined = values[place]
    sharded = any(compat.is_sharded(part.weight) for part in joined.parts)
    if sharded or any(map(is_view, values)):
        return None
    if name == "dot_general":
        return _product(evaluate, eqn, values, place)
    if name in PER_PART:
        if any(jnp.size(value) != 1 for i, value in enumerate(values) if i != place):
            return None
        return _each(evaluate, eqn, joined, joined.axis, lambda part: _bound(eqn, values, place, part))
    if name == "transpose":
        order = eqn.params["permutation"]
        return _each(evaluate, eqn, joined, order.index(joined.axis), lambda part: jnp.transpose(part, order))
    if name == "squeeze":
        gone = eqn.params["dimensions"]
        if joined.axis in gone:
            return None
        axis = joined.axis - sum(one < joined.axis for one in gone)
        return _each(evaluate, eqn, joined, axis, lambda part: jnp.squeeze(part, gone))
    if name == "reshape":
        return _reshaped(evaluate, eqn, joined)
    if name in ("slice", "split"):
        return _parts(evaluate, eqn, joined)
    return None


def _bound(eqn: JaxprEqn, values: Sequence[Value], place: int, part: jax.Array) -> jax.Array:
    own = list(values)
    own[place] = part
    return compat.bind(eqn, own)[0]


def _traced(evaluate: Evaluate, eqn: JaxprEqn, fn: Callable[..., Any], *values: Value) -> list[Value]:
    """The outputs of a function of weights and arrays, which says of itself that it is the equation."""
    types = []
    for value in values:
        types.append(compat.view_type(value) if is_view(value) else jax.typeof(value))
    program = jax.make_jaxpr(fn)(*types)
    eqns = [inner.replace(source_info=eqn.source_info) for inner in program.jaxpr.eqns]
    jaxpr = program.jaxpr.replace(eqns=eqns)
    return evaluate(program.replace(jaxpr=jaxpr), *values)


def _each(evaluate: Evaluate, eqn: JaxprEqn, joined: Joined, axis: int, fn: Callable[..., jax.Array]) -> Outputs:
    """The same done to each of the weights."""
    parts = [_traced(evaluate, eqn, fn, part)[0] for part in joined.parts]
    if not all(map(is_view, parts)):
        return None
    return [Joined(tuple(parts), axis)]


def _reshaped(evaluate: Evaluate, eqn: JaxprEqn, joined: Joined) -> Outputs:
    """A reshape that leaves the joined axis, or splits it between the weights."""
    old, new = joined.shape, eqn.params["new_sizes"]
    before = after = 1
    for n in old[: joined.axis]:
        before *= n
    for n in old[joined.axis + 1 :]:
        after *= n
    start, total = 0, 1
    while start < len(new) and total < before:
        total *= new[start]
        start += 1
    if total != before:
        return None
    rest, end, total = 1, start + 1, new[start] if start < len(new) else 1
    while end < len(new) and total < old[joined.axis]:
        total, rest = total * new[end], rest * new[end]
        end += 1
    if total != old[joined.axis] or any(size % rest for size in joined.sizes):
        return None
    parts = []
    for part, size in zip(joined.parts, joined.sizes, strict=True):
        view = part.reshaped((*new[:start], size // rest, *new[start + 1 :]))
        if view is None:
            return None
        parts.append(view)
    return [Joined(tuple(parts), start)]


def _parts(evaluate: Evaluate, eqn: JaxprEqn, joined: Joined) -> Outputs:
    """Slices that are whole weights again."""
    p, axis = eqn.params, joined.axis
    ranges: list[tuple[int, int]] = []
    if eqn.primitive.name == "split":
        if p["axis"] != axis:
            return None
        start = 0
        for size in p["sizes"]:
            ranges.append((start, start + size))
            start += size
    else:
        others = [i for i in range(len(joined.shape)) if i != axis]
        is_whole = all((p["start_indices"][i], p["limit_indices"][i]) == (0, joined.shape[i]) for i in others)
        if not is_whole or any(stride != 1 for stride in p["strides"] or ()):
            return None
        ranges.append((p["start_indices"][axis], p["limit_indices"][axis]))
    ends = [0]
    for size in joined.sizes:
        ends.append(ends[-1] + size)
    outs: list[Value] = []
    for start, limit in ranges:
        if start not in ends or limit not in ends:
            return None
        chosen = joined.parts[ends.index(start) : ends.index(limit)]
        outs.append(chosen[0] if len(chosen) == 1 else Joined(chosen, axis))
    return outs


def _product(evaluate: Evaluate, eqn: JaxprEqn, values: Sequence[Value], place: int) -> Outputs:
    """A product with each of the weights: a sum over contracted parts, or the results side by side."""
    joined, x = values[place], values[1 - place]
    p, axis, sizes = eqn.params, joined.axis, joined.sizes
    (contracted, stacked) = p["dimension_numbers"]
    own_contracted, own_stacked = contracted[place], stacked[place]
    met: int | None = None  # the axis of x that meets the joined one
    result: int | None = None  # the axis of the result that is the joined one
    if axis in own_contracted:
        met = contracted[1 - place][own_contracted.index(axis)]
    elif axis in own_stacked:
        result = own_stacked.index(axis)
        met = stacked[1 - place][result]
    else:
        free = [i for i in range(len(joined.shape)) if i not in (*own_contracted, *own_stacked)]
        left = 0 if place == 0 else x.ndim - len(own_contracted) - len(own_stacked)
        result = len(own_stacked) + left + free.index(axis)
    if p.get("out_sharding") is not None:
        return None

    def product(x: jax.Array, *parts: jax.Array) -> jax.Array:
        inputs = [x] * len(parts) if met is None else jax.lax.split(x, sizes, met)
        results = []
        for one, part in zip(inputs, parts, strict=True):
            operands = [part, one] if place == 0 else [one, part]
            results.append(jax.lax.dot_general_p.bind(*operands, **p))
        if result is not None:
            return jax.lax.concatenate(results, result)
        total = results[0]
        for one in results[1:]:
            total = total + one
        return total

    return _traced(evaluate, eqn, product, x, *joined.parts)


def layers_of(value: PyTree) -> list[View] | None:
    """The weights of a value that are joined along its first axis, one of them each; None if it has no such."""
    if not isinstance(value, Joined) or value.axis != 0 or any(size != 1 for size in value.sizes):
        return None
    views = []
    for part in value.parts:
        views.append(part.replace(axes=part.axes[1:]))
    return views if can_be_stacked(views) else None
