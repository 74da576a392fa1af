"""Axes permuted, split, joined, cut, reversed and padded: another view of the same weight."""

import jax
from jax.extend.core import JaxprEqn

from peft_jax.adapt.digits import BROADCAST, Atom, Axis, flat, length
from peft_jax.adapt.edits import Cut, Pad, Reverse, cuts
from peft_jax.adapt.rules.base import is_probe, or_merge, without
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view
from peft_jax.core.selecting import picked


def transpose(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Axes in another order."""
    (view,) = values
    return [view.replace(axes=picked(view.axes, eqn.params["permutation"]))]


def reshape(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Axes split and joined."""
    return or_merge(values[0].reshaped(eqn.params["new_sizes"]))


def squeeze(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Without some axes of length 1."""
    (view,) = values
    return [view.replace(axes=tuple(without(view.axes, eqn.params["dimensions"])))]


def reduce_sum(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A sum over axes of length 1, as `jnp.einsum` makes it, takes them away."""
    (view,) = values
    if any(view.shape[axis] != 1 for axis in eqn.params["axes"]):
        return None
    return [view.replace(axes=tuple(without(view.axes, eqn.params["axes"])))]


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


def slice_(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Some of the stacked layers, or a part of the inputs or the outputs."""
    view, p = values[0], eqn.params
    limits = zip(p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(view.shape), strict=True)
    for i, limit in enumerate(limits):
        if view is not None and limit != (0, view.shape[i], 1):
            view = _edited(view, i, Cut(*map(int, limit)))
    return or_merge(view)


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
    return or_merge(view)


def pad(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Zeros around a matrix, or between its entries."""
    view, fill = values
    if is_view(fill) or isinstance(fill, jax.core.Tracer) or fill != 0:
        return None
    for axis, config in enumerate(eqn.params["padding_config"]):
        numbers = tuple(map(int, config))
        if view is not None and numbers != (0, 0, 0):
            view = _edited(view, axis, Pad(*numbers))
    return or_merge(view)


def _edited(view: View, axis: int, operation: Cut | Reverse | Pad) -> View | None:
    """A view with an operation done along an axis: to the arrays of stacked layers, or to products.

    Layers of zeros are not added: not every method has a zero.
    """
    has_zeros = isinstance(operation, Pad) and not is_probe(view)
    layers = None if has_zeros else view.mapped(axis, operation.along, drop=False)
    return view.edited(axis, operation) if layers is None else layers
