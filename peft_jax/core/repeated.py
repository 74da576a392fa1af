"""Layers of a stack in another order, some of them more than once, without copies of their weights."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.serialized_nodes import register_node
from peft_jax.core.weight import Change, MergeError, Weight, as_weight


@partial(register_node, data_fields=("base", "order"), meta_fields=("layout", "inner", "dense_dtype"))
@dataclasses.dataclass(frozen=True)
class Repeated(Weight):
    """A stack whose layers are those of another one: ``dense()[i] == base[order[i]]`` along the first stacked axis.

    Attributes:
        base: The other stack, an array or a quantized leaf; always whole.
        order: int32 ``(layers,)``, or a number where the stacked axis is gone.
        layout: Axes of what the leaf stands for.
        inner: Axes of ``base``.
        dense_dtype: Element type of the dense array.
    """

    base: Any
    order: jax.Array
    layout: Layout
    inner: Layout
    dense_dtype: jnp.dtype

    @classmethod
    def of(cls, base: Any, order: Sequence[int], layout: Layout) -> "Repeated":
        """The layers of a leaf in this order.

        Example:
            >>> stack = Layout(stack=(0,), inp=(1,), out=(2,))
            >>> Repeated.of(jnp.arange(3.0).reshape(3, 1, 1), [0, 1, 1, 2], stack).dense().ravel().tolist()
            [0.0, 1.0, 1.0, 2.0]
        """
        return cls(base, jnp.asarray(order, jnp.int32), layout, layout, jnp.dtype(base.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        axis, shape = self.inner.stack[0], self._base.shape
        layers = self.order.shape if len(self.layout.stack) == len(self.inner.stack) else ()
        return (*shape[:axis], *layers, *shape[axis + 1 :])

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the dense array."""
        return self.dense_dtype

    @property
    def _base(self) -> Weight:
        return as_weight(self.base, self.inner)

    @property
    def array(self) -> jax.Array:
        """The array of the base, which has another number of layers."""
        return self._base.array

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self._base.stored_shape

    def entries(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the base."""
        return self._base.entries(spec)

    def _taken(self) -> Weight:
        """The layers themselves."""

        def take(array: jax.Array, axis: int) -> jax.Array:
            if self.order.ndim:
                return jnp.take(array, self.order, axis, mode="clip")
            return jax.lax.dynamic_index_in_dim(array, self.order, axis, keepdims=False)

        return self._base.mapped(0, take, drop=not self.order.ndim).astype(self.dtype)

    def dense(self) -> jax.Array:
        """The dense array, in which repeated layers are copies."""
        return self._taken().dense()

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with the layers, which backward takes from the base again rather than keeps."""

        @jax.checkpoint
        def product_with(leaf: Repeated, x: jax.Array) -> jax.Array:
            y: jax.Array = leaf._taken().apply(x, product)
            return y

        return product_with(self, x)

    def astype(self, dtype: jnp.dtype) -> "Repeated":
        """The leaf with its layers converted as they are used."""
        return dataclasses.replace(self, dense_dtype=jnp.dtype(dtype))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Repeated":
        """The leaf with its order changed, and its base as it was."""
        if position:
            raise MergeError("Only the first stacked axis of a leaf with repeated layers can be sliced.")
        layout = self.layout.unstacked(0) if drop else self.layout
        return dataclasses.replace(self, order=change(self.order, 0), layout=layout)

    def split(self, position: int, sizes: Sequence[int]) -> "Repeated":
        """Not there: the order of the layers has one axis."""
        raise MergeError("the stacked axis of a leaf with repeated layers cannot be split.")

    def join(self, position: int) -> "Repeated":
        """Not there: one of the two axes is that of the order."""
        raise MergeError("the stacked axes of a leaf with repeated layers cannot be joined.")

    def relaid(self, layout: Layout) -> "Repeated":
        """The leaf with another layout of the same axes."""
        return dataclasses.replace(self, layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> "Repeated":
        """The base is sharded as the dense array would be, the order never."""
        if entries[self.inner.stack[0]] is not None:
            raise MergeError("the repeated layers of a leaf are sharded.")
        base = self._base.specs(entries)
        return dataclasses.replace(self, base=base, order=PartitionSpec())  # type: ignore[arg-type]


def is_repeated(node: PyTree) -> bool:
    """Whether a node of a tree is a leaf with repeated layers (for ``is_leaf``)."""
    return isinstance(node, Repeated)


def without_bases(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A tree whose repeated layers have lost their bases, for a loop over what is left to slice; and the bases."""
    bases = jax.tree.map(lambda node: node.base if is_repeated(node) else None, tree, is_leaf=is_repeated)
    return jax.tree.map(lambda node: _on(None, node), tree, is_leaf=is_repeated), bases


def with_bases(tree: PyTree, bases: PyTree) -> PyTree:
    """The inverse of `without_bases`."""
    return jax.tree.map(lambda node, base: _on(base, node), tree, bases, is_leaf=is_repeated)


def _on(base: Any, node: Any) -> Any:
    return dataclasses.replace(node, base=base) if is_repeated(node) else node
