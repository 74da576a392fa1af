"""Which axis of a leaf counts members that share an input, as of an ensemble ``vmap(net, in_axes=(0, None))``.

The product of a shared input with all members, ``x @ w`` for ``w`` of axes ``(member, in, out)``, does not tell the
members from outputs such as the heads of an attention. A later product does, if it takes each member's result to that
member's own matrix. So the program is walked through with a note of what each axis of a variable is.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.biases import CALLS
from peft_jax.adapt.notes import Program, notes_of_outputs
from peft_jax.core.selecting import picked

Axes = tuple[frozenset[str], ...]  # for each axis of a variable the paths of leaves whose first axis it is


class Known(NamedTuple):
    """The axes of a variable, as far as known, and whether it is a weight, made of leaves and numbers alone."""

    axes: Axes
    is_weight: bool


def leaves_of_members(jaxpr: ClosedJaxpr, paths: Sequence[str | None], candidates: Collection[str]) -> set[str]:
    """Those of the candidates whose first axis counts members.

    Args:
        jaxpr: A program.
        paths: For each of its inputs the path of the leaf, None for other arguments.
        candidates: Paths of leaves whose first axis is one of several axes of outputs.
    """
    found = set[str]()
    if not candidates:
        return found
    inputs: list[Known | None] = []
    for path, variable in zip(paths, jaxpr.jaxpr.invars, strict=True):
        ndim = compat.type_of(variable).ndim
        if path is None or ndim == 0:
            inputs.append(None)
        else:
            inputs.append(Known((frozenset([path]), *[frozenset[str]()] * (ndim - 1)), is_weight=True))
    _walk(jaxpr, inputs, found)
    return found & set(candidates)


def _walk(program: Program, inputs: Iterable[Known | None], found: set[str]) -> list[Known | None]:
    """Notes of a program's outputs, given those of its inputs; leaves of members are put into ``found``."""
    return notes_of_outputs(program, inputs, lambda eqn, operands: _results(eqn, operands, found))


def _results(eqn: JaxprEqn, operands: Sequence[Known | None], found: set[str]) -> Sequence[Known | None]:
    """Notes of an equation's outputs; fewer than there are if nothing is known of the others."""
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return [_product(eqn, operands, found)]
    if name in CALLS:
        return _walk(p[CALLS[name]], operands, found)
    if name == "scan":
        parts = compat.scan_parts(eqn)
        end = parts.num_consts + parts.num_carry
        layers = [value and value._replace(axes=value.axes[1:]) for value in operands[end:]]
        _walk(parts.body, [*operands[: parts.num_consts], *[None] * parts.num_carry, *layers], found)
        return []
    if len(eqn.outvars) != 1:
        return []
    shape = compat.type_of(eqn.outvars[0]).shape
    first = operands[0]
    if name == "transpose" and first is not None:
        return [first._replace(axes=picked(first.axes, p["permutation"]))]
    if name == "broadcast_in_dim" and first is not None:
        return [first._replace(axes=_placed(first.axes, p["broadcast_dimensions"], len(shape)))]
    if name in ("squeeze", "reduce_sum", "reduce_max") and first is not None:
        gone = p["dimensions" if name == "squeeze" else "axes"]
        return [first._replace(axes=tuple(axis for i, axis in enumerate(first.axes) if i not in gone))]
    return [_same_axes(eqn, operands, shape)]


def _placed(axes: Axes, places: Sequence[int], ndim: int) -> Axes:
    """Axes at their places among others of which nothing is known."""
    placed = [frozenset[str]()] * ndim
    for axis, place in zip(axes, places, strict=True):
        placed[place] = axis
    return tuple(placed)


def _same_axes(eqn: JaxprEqn, operands: Sequence[Known | None], shape: Sequence[int]) -> Known | None:
    """The result of an operation on each entry, or on some axes: axes in their places, if their lengths are the same.

    Of a weight beside an activation, such as a bias, the axes are not followed.
    """
    arrays: list[tuple[Known | None, tuple[int, ...]]] = []
    for atom, value in zip(eqn.invars, operands, strict=True):
        own_shape = compat.type_of(atom).shape
        if own_shape and not compat.is_literal(atom):
            arrays.append((value, own_shape))
    is_weight = all(value is not None and value.is_weight for value, _ in arrays)
    axes = [frozenset[str]()] * len(shape)
    for value, own_shape in arrays:
        if value is None or len(own_shape) != len(shape) or value.is_weight != is_weight:
            continue
        for i, axis in enumerate(value.axes):
            if own_shape[i] == shape[i]:
                axes[i] |= axis
    return Known(tuple(axes), is_weight)


def _product(eqn: JaxprEqn, operands: Sequence[Known | None], found: set[str]) -> Known:
    """The result of a product; if it has members in both operands, one of them a weight, they are found."""
    (contracted, stacked) = eqn.params["dimension_numbers"]
    sides: list[Known] = []
    for atom, value in zip(eqn.invars, operands, strict=True):
        nothing = Known((frozenset[str](),) * compat.type_of(atom).ndim, is_weight=False)
        sides.append(nothing if value is None else value)
    left, right = sides
    axes: list[frozenset[str]] = []
    for i, j in zip(*stacked, strict=True):
        results, layers = frozenset[str](), frozenset[str]()
        for side, axis in ((left, left.axes[i]), (right, right.axes[j])):
            if side.is_weight:
                layers |= axis
            else:
                results |= axis
        if layers:
            found |= results
        axes.append(results)
    for side, own_contracted, own_stacked in zip(sides, contracted, stacked, strict=True):
        for i, axis in enumerate(side.axes):
            if i not in (*own_contracted, *own_stacked):
                axes.append(axis)
    return Known(tuple(axes), is_weight=False)
