"""A weight: a leaf that stands for a dense array without being one (quantized, adapted, or both)."""

import abc
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.core.articles import article
from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, FirstFactor, Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import picked

Change = Callable[[jax.Array, int], jax.Array]


class MergeError(ValueError):
    """A weight cannot be made dense without changing what it computes."""


class Weight(abc.ABC):
    """Stands for a dense array of ``shape`` and ``dtype``, seen as one matrix ``(in, out)`` through ``layout``.

    `dense` defines its value; `apply` is a cheaper way to use it. JAX functions that accept what has a
    ``__jax_array__`` (those of ``jax.numpy``, and layers built on them) see the dense array.
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
        """Whether using the weight is cheaper than forming the dense array."""
        return True

    @property
    @abc.abstractmethod
    def array(self) -> jax.Array:
        """The stored array that has the dense array's place on the devices, and its axes unless `entries` says more."""

    def entries(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """The entries of a spec by the dense array's axes, given that of ``array``."""
        return tuple(spec)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the stored elements would have as a dense array; repeated layers count once."""
        return self.array.shape

    @property
    def in_pieces(self) -> bool:
        """Whether parts of the outputs can be converted to such a weight one by one, and be joined."""
        return True

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """The dense array, of ``shape`` and ``dtype``."""

    def by_row(self) -> jax.Array | None:
        """The dense arrays of each row of a batch ``(batch, *shape)``, of a vector that rows have their own of."""
        return None

    @abc.abstractmethod
    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """``product.full(x, matrix)``. No stacked axes, save for the groups of a grouped product."""

    @property
    def depth(self) -> int:
        """Number of adapters on the weight, one on another."""
        return 0

    @property
    def unadapted(self) -> "Weight":
        """The weight without the adapters on it."""
        return self

    def ready(self) -> "Weight":
        """The weight for a product: adapters on it have their arrays in the element type of their products."""
        return self

    def first_factors(self) -> dict[FirstFactor, jax.Array]:
        """The matrices ``(in, rank)`` that its adapters multiply the inputs by with ``product.down_by_role``."""
        return {}

    @abc.abstractmethod
    def astype(self, dtype: jnp.dtype) -> "Weight":
        """The weight in another element type."""

    @abc.abstractmethod
    def mapped(self, position: int, change: Change, *, drop: bool) -> "Weight":
        """The weight after ``change(array, axis)`` of each of its arrays along one of the stacked axes.

        With ``drop`` the axis is gone afterwards, or stands in front of all arrays for ``scan`` or ``vmap`` to slice.
        """

    @abc.abstractmethod
    def relaid(self, layout: Layout) -> "Weight":
        """The weight with another layout of the same arrays."""

    def split(self, position: int, sizes: Sequence[int]) -> "Weight":
        """The weight with one of the stacked axes split into several.

        Raises:
            MergeError: if its arrays cannot be split so.
        """

        def apart(array: jax.Array, axis: int) -> jax.Array:
            return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])

        layout = self.layout.split(position, len(sizes))
        return self.mapped(position, apart, drop=False).relaid(layout)

    def join(self, position: int) -> "Weight":
        """The weight with one of the stacked axes and the next one, which is beside it, as one: undoes `split`.

        Raises:
            MergeError: if its arrays cannot be joined so.
        """

        def together(array: jax.Array, axis: int) -> jax.Array:
            n, m = array.shape[axis : axis + 2]
            return array.reshape(*array.shape[:axis], n * m, *array.shape[axis + 2 :])

        layout = self.layout.join(position)
        return self.mapped(position, together, drop=False).relaid(layout)

    @abc.abstractmethod
    def specs(self, entries: tuple[Any, ...]) -> PyTree:
        """Specs of all arrays, in the weight's structure, given the entry of each axis of the dense array.

        Raises:
            MergeError: if an array has several axes flattened into one and an inner one of them is sharded.
        """

    def __jax_array__(self) -> jax.Array:
        _warn_of_merging(type(self).__name__)
        return self.dense()

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            f"{article(type(self).__name__, first=True)} leaf stands for an array and cannot be indexed. "
            "Wrap the function that indexes it: pj.adapt(fn). Or make plain arrays of the tree: pj.merge(params)."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(name)
        raise AttributeError(
            f"{article(type(self).__name__, first=True)} leaf stands for an array but has no '{name}'. "
            "Wrap the function that uses it: pj.adapt(fn). Or make plain arrays of the tree: pj.merge(params)."
        )


@functools.cache
def _warn_of_merging(kind: str) -> None:
    warnings.warn(
        f"{article(kind, first=True)} leaf is used outside of pj.adapt, so it is merged into a dense array "
        "at each use. pj.adapt(fn) computes the same without merging, and faster.",
        stacklevel=4,
    )


def is_weight(node: PyTree) -> bool:
    """Whether a node of a tree is a `Weight` (for ``is_leaf``)."""
    return isinstance(node, Weight)


class Dense(Weight):
    """A plain array seen as a weight; lives only during a computation, never in a tree."""

    array: jax.Array = None  # type: ignore[assignment]  # an attribute here, not a property

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

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with the array as a matrix."""
        return product.full(x, self.layout.matrix(self.array))

    def astype(self, dtype: jnp.dtype) -> "Dense":
        """The converted array."""
        return Dense(self.array.astype(dtype), self.layout)

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Dense":
        """The changed array."""
        array = change(self.array, self.layout.stack[position])
        return Dense(array, self.layout.unstacked(position) if drop else self.layout)

    def relaid(self, layout: Layout) -> "Dense":
        """The array with another layout."""
        return Dense(self.array, layout)

    def specs(self, entries: tuple[Any, ...]) -> PartitionSpec:
        """The entries."""
        return PartitionSpec(*entries)


def varying_over(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """``x`` made to vary over these axes of a mesh, inside of ``shard_map``, as far as it does not yet."""
    missing = frozenset(axes) - varying(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def varying(array: jax.Array) -> frozenset[str]:
    """Axes of a mesh over which an array varies inside of ``shard_map``."""
    kind = jax.typeof(array)
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ()))


def as_sliced(weight: Weight) -> Weight:
    """A leaf whose arrays a loop around `peft_jax.adapt` has sliced, with the layout of what is left.

    Raises:
        ValueError: if its axes are not those of its layout after such a loop.
    """
    layout, gone = weight.layout, len(weight.layout.order) - weight.ndim
    for _ in range(max(gone, 0)):
        if layout.stack[:1] != (0,):
            break
        layout = layout.unstacked(0)
    if len(layout.order) != weight.ndim:
        raise ValueError(
            f"A leaf of shape {weight.shape} has the layout {weight.layout}. It was sliced or stacked outside of "
            "pj.adapt along an axis that is not the first stacked one. Put the loop into the function that adapt gets."
        )
    return weight.relaid(layout) if gone else weight


def dense_in_ensemble(weight: Weight) -> jax.Array:
    """The dense array of a leaf, which a ``vmap`` around what attached it may have given axes in front."""
    dense: Callable[[Weight], jax.Array] = type(weight).dense
    for _ in range(weight.ndim - len(weight.layout.order)):
        dense = jax.vmap(dense)
    return dense(weight)


def as_weight(leaf: PyTree, layout: Layout) -> Weight:
    """A leaf as a weight: itself, or `Dense` around an array."""
    return leaf if is_weight(leaf) else Dense(leaf, layout)


def as_leaf(weight: Weight) -> PyTree:
    """The inverse of `as_weight`."""
    return weight.array if isinstance(weight, Dense) else weight


def role_specs(layout: Layout, entries: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Entries of a spec by role, given those of a leaf's axes: ``"stack"`` has one an axis, ``in`` and ``out`` one.

    Raises:
        MergeError: if an axis is sharded that is not the first of those that are flattened into one.
    """

    def flat(axes: tuple[int, ...]) -> tuple[Any, ...]:
        if any(entries[axis] is not None for axis in axes[1:]):
            raise MergeError(f"axes {axes} are one axis of the matrix, and one that is not the first is sharded.")
        return (entries[axes[0]],) if axes else ()

    return {"stack": picked(entries, layout.stack), "in": flat(layout.inp), "out": flat(layout.out)}
