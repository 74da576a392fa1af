"""Operations on each entry: a matrix times a number, another element type, and what is done to each array."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.rules.base import is_probe, merged, or_merge
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view
from peft_jax.core.float_types import is_wide_float, wider_float
from peft_jax.core.scaled import Scaled


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
    return or_merge(scaled(values[0], jnp.float32(-1)))


def scaled(view: View, factor: jax.Array) -> View | None:
    """A matrix times a number; None if the weight is a vector, of which a scaled copy costs nothing."""
    if is_probe(view) and len(view.shape) > 1:
        return view
    return view.replace(weight=Scaled.of(view.weight, factor)) if view.weight.layout.inp else None


def convert_element_type(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """In another floating-point type; one of 8 bits is meant to round the merged weight."""
    view, dtype = values[0], eqn.params["new_dtype"]
    if not is_wide_float(dtype):
        return None
    return [view.replace(weight=view.weight.astype(dtype))]


def on_each_array(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The same for all arrays of the weight."""
    return [jax.tree.map(lambda array: compat.bind(eqn, [array])[0], values[0])]


def untrained_row(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """The lookup that follows leaves out the row's gradient; rows are counted in the whole table."""
    (view,) = values
    if view.edits:
        return None
    return [view.replace(untrained_row=eqn.params["row"])]


def optimization_barrier(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A weight's arrays have a barrier each: one for all would give the frozen base a gradient."""
    others = iter(jax.lax.optimization_barrier([value for value in values if not is_view(value)]))
    outs = []
    for value in values:
        outs.append(jax.tree.map(jax.lax.optimization_barrier, value) if is_view(value) else next(others))
    return outs
