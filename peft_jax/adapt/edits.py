"""Edits along one axis of a view: slices, padding by zeros and reversal, recorded and run on products.

An edit of the outputs of a matrix is the same edit of the product: ``x @ w[:, 2:] == (x @ w)[:, 2:]``. One of the
inputs is its transpose on the other operand: ``x @ w[::-1] == x[:, ::-1] @ w``.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Operation(Protocol):
    """A linear change along one axis of an array; equal operations are equal objects."""

    def length(self, n: int) -> int:
        """Length of the axis after the operation."""

    def along(self, array: jax.Array, axis: int) -> jax.Array:
        """The changed array."""

    def transposed(self, array: jax.Array, axis: int, n: int) -> jax.Array:
        """The transpose of `along` for an axis of length ``n``."""


class Cut(NamedTuple):
    """Every ``stride``-th entry from ``start`` up to ``limit``."""

    start: int
    limit: int
    stride: int = 1

    def length(self, n: int) -> int:
        """Number of entries that are left."""
        return -(-(self.limit - self.start) // self.stride)

    def along(self, array: jax.Array, axis: int) -> jax.Array:
        """The entries."""
        return jax.lax.slice_in_dim(array, self.start, self.limit, self.stride, axis)

    def transposed(self, array: jax.Array, axis: int, n: int) -> jax.Array:
        """The entries at their places, and zeros elsewhere."""
        last = self.start + (self.length(n) - 1) * self.stride
        return Pad(self.start, n - 1 - last, self.stride - 1).along(array, axis)


class Pad(NamedTuple):
    """Zeros before, after and between the entries; negative numbers take entries away, as in ``jax.lax.pad``."""

    low: int
    high: int
    between: int = 0

    def length(self, n: int) -> int:
        """Number of entries and zeros."""
        return self.low + self.high + n + max(n - 1, 0) * self.between

    def along(self, array: jax.Array, axis: int) -> jax.Array:
        """The entries among zeros."""
        config = [(0, 0, 0)] * array.ndim
        config[axis] = (self.low, self.high, self.between)
        return jax.lax.pad(array, jnp.zeros((), array.dtype), config)

    def transposed(self, array: jax.Array, axis: int, n: int) -> jax.Array:
        """The entries alone."""
        entries = Pad(-self.low, -self.high).along(array, axis)
        return jax.lax.slice_in_dim(entries, 0, None, self.between + 1, axis)


class Reverse(NamedTuple):
    """The entries in reverse order."""

    def length(self, n: int) -> int:
        """As before."""
        return n

    def along(self, array: jax.Array, axis: int) -> jax.Array:
        """The entries, last one first."""
        return jax.lax.rev(array, (axis,))

    def transposed(self, array: jax.Array, axis: int, n: int) -> jax.Array:
        """The same."""
        return self.along(array, axis)


def cuts(sizes: Sequence[int]) -> list[Cut]:
    """The parts into which ``jax.lax.split`` cuts an axis."""
    parts, start = [], 0
    for size in sizes:
        parts.append(Cut(start, start + int(size)))
        start += int(size)
    return parts
