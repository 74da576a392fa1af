"""A weight: a leaf that stands for a dense array without being one (quantized, adapted, or both)."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout


class Dot(NamedTuple):
    """How a product is to be computed, as ``jax.lax.dot_general`` takes it."""

    precision: Any = None
    preferred_element_type: Any = None


PLAIN_DOT = Dot()


class MergeError(ValueError):
    """A weight cannot be made dense without changing what it computes."""


class Weight(abc.ABC):
    """Stands for a dense array of ``shape`` and ``dtype``, seen as one matrix ``(in, out)`` through ``layout``.

    `dense` defines its value; the other methods are cheaper ways to use it.
    """

    layout: Layout

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Element type of the dense array."""

    @property
    def ndim(self) -> int:
        """Rank of the dense array."""
        return len(self.shape)

    @property
    def side_path(self) -> bool:
        """Whether products and lookups are cheaper than forming the dense array."""
        return True

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The dense array, of ``shape`` and ``dtype``."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array, dot: Dot = PLAIN_DOT) -> jax.Array:
        """``x @ matrix`` for ``x`` of shape ``(..., in)`` and no stacked axes; gives ``(..., out)``."""

    @abc.abstractmethod
    def take(self, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """``rows(matrix)``, where ``rows`` gathers along axis 0: ``(in, k) -> (..., k)``. No stacked axes."""

    @abc.abstractmethod
    def rearranged(self, move: Callable[[jax.Array], jax.Array], layout: Layout) -> "Weight":
        """The weight after ``move``, a transpose or reshape or slice of its dense array, has led to ``layout``."""

    @abc.abstractmethod
    def astype(self, dtype: jnp.dtype) -> "Weight":
        """The weight in another element type."""

    @abc.abstractmethod
    def unstacked(self) -> "Weight":
        """What a slice of all arrays along axis 0 is: the same weight with its first stacked axis gone."""


def is_weight(node: Any) -> bool:
    """Whether a node of a tree is a `Weight` (for ``is_leaf``)."""
    return isinstance(node, Weight)


class Dense(Weight):
    """A plain array seen as a weight; lives only during a computation, never in a tree."""

    def __init__(self, array: jax.Array, layout: Layout):
        self.array, self.layout = array, layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the array."""
        return self.array.dtype

    @property
    def side_path(self) -> bool:
        """False: it is dense already."""
        return False

    def dense(self) -> jax.Array:
        """The array itself."""
        return self.array

    def matmul(self, x: jax.Array, dot: Dot = PLAIN_DOT) -> jax.Array:
        """``x @ matrix``."""
        return jnp.matmul(x, self.layout.matrix(self.array), **dot._asdict())

    def take(self, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """``rows(matrix)``."""
        return rows(self.layout.matrix(self.array))

    def rearranged(self, move: Callable[[jax.Array], jax.Array], layout: Layout) -> "Dense":
        """The moved array."""
        return Dense(move(self.array), layout)

    def astype(self, dtype: jnp.dtype) -> "Dense":
        """The converted array."""
        return Dense(self.array.astype(dtype), self.layout)

    def unstacked(self) -> "Dense":
        """The slice."""
        return Dense(self.array, self.layout.unstacked())


def as_weight(leaf: Any, layout: Layout) -> Weight:
    """A leaf as a weight: itself, or `Dense` around an array."""
    return leaf if is_weight(leaf) else Dense(leaf, layout)


def as_leaf(weight: Weight) -> Any:
    """The inverse of `as_weight`."""
    return weight.array if isinstance(weight, Dense) else weight
