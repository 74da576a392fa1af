"""Types of the rules, and helpers that rules of several kinds share."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.digits import Axis
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, stands_for_weights
from peft_jax.core.weight import MergeError

Rule = Callable[[Evaluate, JaxprEqn, list[Value]], Outputs]


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


def or_merge(view: View | None) -> Outputs:
    """The outputs of a rule that has one view; None where there is none, so that the weight is merged."""
    return None if view is None else [view]


def used(eqn: JaxprEqn, view: View, y: jax.Array | None) -> Outputs:
    """The outputs of a rule that multiplied by a weight, in the equation's element type; and report it to the watch."""
    if y is None:
        return None
    view.done(eqn, merged=False)
    return [y.astype(compat.type_of(eqn.outvars[0]).dtype)]


def without(axes: Sequence[Axis], gone: Collection[int]) -> list[Axis]:
    """The axes that are not among the numbers ``gone``."""
    return [axis for i, axis in enumerate(axes) if i not in gone]


def entries_of(spec: PartitionSpec, value: Value) -> list[Any]:
    """Entries of a spec, one for each axis of a value."""
    return [*spec, *[None] * (len(value.shape) - len(spec))]


def is_probe(view: View) -> bool:
    """Whether the axes of a weight are unknown, so that its shapes alone are asked for."""
    return not (view.weight.layout.inp or view.weight.layout.out)
