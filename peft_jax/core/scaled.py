"""A weight times a number, without a scaled copy of it: products are scaled instead."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, FirstFactor, Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import picked
from peft_jax.core.weight import Change, Weight, as_leaf, as_weight


@partial(jax.tree_util.register_dataclass, data_fields=("base", "factor"), meta_fields=("layout",))
@dataclasses.dataclass(frozen=True)
class Scaled(Weight):
    """``factor * base``; lives only during a computation, never in a tree.

    Attributes:
        base: The other weight, as a leaf.
        factor: One number for each stacked layer, of the shape of the stacked axes; float32, or wider.
        layout: Axes of ``base``.
    """

    base: Any
    factor: jax.Array
    layout: Layout

    @classmethod
    def of(cls, base: Weight, factor: jax.Array) -> "Scaled":
        """A weight times one number.

        Example:
            >>> from peft_jax.core.weight import Dense
            >>> Scaled.of(Dense(jnp.ones((2, 3)), Layout()), jnp.float32(2)).apply(jnp.ones(2)).tolist()
            [4.0, 4.0, 4.0]
        """
        stack = base.layout.stack_shape(base.shape)
        return cls(as_leaf(base), jnp.broadcast_to(factor, stack), base.layout)

    @property
    def _base(self) -> Weight:
        return as_weight(self.base, self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the base."""
        return self.base.dtype

    @property
    def array(self) -> jax.Array:
        """The array of the base."""
        return self._base.array

    def dense(self) -> jax.Array:
        """The scaled array."""
        axes = [axis for axis in range(self.ndim) if axis not in self.layout.stack]
        order = [sorted(self.layout.stack).index(axis) for axis in self.layout.stack]
        factor = jnp.moveaxis(self.factor, range(len(order)), order)
        return (self._base.dense().astype(factor.dtype) * jnp.expand_dims(factor, axes)).astype(self.dtype)

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with the base, scaled."""
        y = self._base.apply(x, product)
        kind = self.factor.dtype
        if self.factor.ndim == 0:
            return (y.astype(kind) * self.factor).astype(y.dtype)
        _, n_out = self.layout.sizes(self.shape)
        factor = jnp.broadcast_to(self.factor[..., None], (*self.factor.shape, n_out))
        return product.scale(y, factor)

    @property
    def depth(self) -> int:
        """Number of adapters on the base."""
        return self._base.depth

    def ready(self) -> "Scaled":
        """The weight with its base ready."""
        return dataclasses.replace(self, base=as_leaf(self._base.ready()))

    def first_factors(self) -> dict[FirstFactor, jax.Array]:
        """Those of the base."""
        return self._base.first_factors()

    def astype(self, dtype: jnp.dtype) -> "Scaled":
        """The weight with its base converted."""
        return dataclasses.replace(self, base=as_leaf(self._base.astype(dtype)))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Scaled":
        """The weight with base and numbers changed along a stacked axis."""
        base = self._base.mapped(position, change, drop=drop)
        return dataclasses.replace(self, base=as_leaf(base), factor=change(self.factor, position), layout=base.layout)

    def relaid(self, layout: Layout) -> "Scaled":
        """The weight with another layout of the same arrays."""
        return dataclasses.replace(self, base=as_leaf(self._base.relaid(layout)), layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> PyTree:
        """Those of the base; the numbers are sharded as the stacked axes are."""
        stack = PartitionSpec(*picked(entries, self.layout.stack))
        return dataclasses.replace(self, base=self._base.specs(entries), factor=stack)  # type: ignore[arg-type]
