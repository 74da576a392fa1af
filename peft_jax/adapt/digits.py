"""The digits of which the axes of a view are made: axes split, joined and permuted are digits in another order."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

BROADCAST, FREE = -1, -2  # in place of an axis: that of a broadcast, and one of the other operand
EDITED = 1000  # in place of an axis: EDITED + i is what the view's i-th edit makes


class Atom(NamedTuple):
    """A digit of an index along an axis of a weight: it counts up to ``size`` in steps of ``stride``."""

    axis: int
    stride: int
    size: int


Axis = tuple[Atom, ...]  # the digits of one axis of a view, major digit first


def free(number: int, size: int) -> Axis:
    """An axis that no weight has."""
    return (Atom(FREE, number, size),)


def flat(axes: Iterable[Axis]) -> tuple[Atom, ...]:
    """The digits of some axes, in order."""
    return tuple(itertools.chain.from_iterable(axes))


def length(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in axis)


def whole_axis(axis: int, size: int) -> Axis:
    """An axis of the view that is one of the weight's, unchanged."""
    return () if size == 1 else (Atom(axis, 1, size),)


def without_weight_axis(axis: Axis, gone: int) -> Axis:
    """An axis of a view once its weight has lost one of its own axes."""
    return tuple(atom._replace(axis=atom.axis - (gone < atom.axis < EDITED)) for atom in axis)


def arrange(array: jax.Array, have: Sequence[Atom], want: Sequence[Axis]) -> jax.Array:
    """An array whose axes hold the digits ``have``, in any grouping, with the axes ``want``."""
    order = [have.index(atom) for atom in flat(want)]
    if order != sorted(order):
        array = jnp.transpose(_reshape(array, [atom.size for atom in have]), order)
    return _reshape(array, [length(axis) for axis in want])


def in_front(array: jax.Array, axis: int) -> jax.Array:
    """The array with one axis before all others."""
    return jnp.moveaxis(array, axis, 0) if axis else array


def broadcast_digits(axes: Iterable[Axis]) -> list[Atom]:
    """The digits of broadcasts among those of some axes."""
    return [atom for atom in flat(axes) if atom.axis == BROADCAST]


def with_broadcasts(array: jax.Array, added: Sequence[Atom]) -> jax.Array:
    """The array with the axes of a broadcast in front."""
    if not added:
        return array
    return jnp.broadcast_to(array, (*[atom.size for atom in added], *array.shape))


def _reshape(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    return array if array.shape == tuple(shape) else jnp.reshape(array, tuple(shape))
