"""Products and convolutions with a weight."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.adapt.digits import Axis, arrange, free
from peft_jax.adapt.multiply import through
from peft_jax.adapt.rules.base import used, without
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view
from peft_jax.core.float_types import is_wide_float, wider_float
from peft_jax.core.product import Convolution, Grouped, Product
from peft_jax.core.selecting import picked


class Side(NamedTuple):
    """The axes of one operand of a product that meet those of the other, and those that both have."""

    contracted: Sequence[int]
    stacked: Sequence[int]


def dot_general(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A product over all input axes, or with the transpose over all output axes."""
    (left_over, right_over), (left_stack, right_stack) = eqn.params["dimension_numbers"]
    left, right = Side(left_over, left_stack), Side(right_over, right_stack)
    is_left = is_view(values[0])
    if is_left:
        (view, x), own, other = values, left, right
    else:
        (x, view), own, other = values, right, left
    for axis in own.stacked:
        view = view.apart(axis)  # of experts chosen by rows and places, the rows
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
    have = operand_axes(x, shared, view)
    of_view, of_x = without(view.axes, (*own.stacked, *own.contracted)), without(have, shared)
    want = list(picked(view.axes, own.stacked))
    want += of_view + of_x if is_left else of_x + of_view
    product = _product(eqn.params, len(of_x), len(want), is_left=is_left)
    if product is None:
        return None
    return used(eqn, view, through(view, x, have, want, role, product))


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
    view = view.without_single_layers()  # that of a layer which was taken from a stack by a computed number
    layout, row = view.weight.layout, free(0, len(x))
    if view.stack_position(0) is None or len(layout.stack) > 1 or view.edits:
        return None
    product = Grouped(p["precision"], p["preferred_element_type"], group_sizes=group_sizes)
    y = view.weight.apply(arrange(x, [*row, *view.axes[1]], [row, view.digits(layout.inp)]), product)
    return used(eqn, view, arrange(y, [*row, *view.digits(layout.out)], [row, view.axes[2]]))


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
    return used(eqn, view, jnp.moveaxis(view.weight.apply(x, product), -1, channels))


def operand_axes(x: jax.Array, shared: Mapping[int, int], view: View) -> list[Axis]:
    """The axes of the other operand: the weight's where they share them, else its own."""
    axes = []
    for i, n in enumerate(x.shape):
        axes.append(view.axes[shared[i]] if i in shared else free(i, n))
    return axes
