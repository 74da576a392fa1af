"""Base classes of methods that add to a matrix what their arrays alone say: a whole matrix, or two factors of one."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.float_types import added
from peft_jax.core.product import Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import without
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method


class AddedChange(Method):
    """A method whose adapted matrix is ``W + D``; `change` is ``D``. The sum is in the precision of ``D``."""

    def change(self, params: Arrays, state: Arrays, n_in: int, n_out: int) -> Float[Array, "in out"]:
        """``D`` of one layer, zero where it is not adapted."""
        raise NotImplementedError

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + D``."""
        n_in, n_out = matrix.shape
        change = self.change(params, state, n_in, n_out)
        return added(matrix, change)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + dropout(x) D``, with a ``D`` that backward makes again rather than keeps."""
        n_in, n_out = base.layout.sizes(base.shape)
        arrays = without(state, ["dropout"])

        @jax.checkpoint
        def update(params: PyTree, arrays: Any, x: jax.Array) -> jax.Array:
            def change(params: PyTree, arrays: Any) -> jax.Array:
                return self.change(params, arrays, n_in, n_out)

            for _ in base.layout.stack:
                change = jax.vmap(change)
            matrix = change(params, arrays)
            return product.full(x if product.looks_up else x.astype(matrix.dtype), matrix)

        y = base.apply(x, product)
        return product.added(y, update(params, arrays, x if product.looks_up else dropout(x, state)))


class FactoredChange(Method):
    """A method whose adapted matrix is ``W + A B``; `factors` are ``A`` and ``B``, in the adapter's precision."""

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """``(in, rank)`` and ``(rank, out)``, whose product is zero for a layer that is not adapted.

        The groups of a grouped product, if there are any, come first.
        """
        raise NotImplementedError

    def merge(self, params: Arrays, state: Mapping[str, Any], matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + A B``."""
        n_in, n_out = matrix.shape
        a, b = self.factors(params, state, n_in, n_out)
        return added(matrix, a @ b)

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (dropout(x) A) B``."""
        n_in, n_out = base.layout.sizes(base.shape)
        a, b = self.factors(params, state, n_in, n_out)
        y = base.apply(x, product)
        update = product.up(product.down(x if product.looks_up else dropout(x, state), a), b)
        return product.added(y, update)
