"""Int8 weight-only quantization: symmetric, one scale per output channel, scale applied after the product.

The scheme is that of LLM.int8's weights (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, section 2.1)
without its quantized activations.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.core.weight import PLAIN_DOT, Dot, Weight


@partial(jax.tree_util.register_dataclass, data_fields=("q", "scale"), meta_fields=("layout", "dense_dtype"))
@dataclasses.dataclass(frozen=True)
class Int8(Weight):
    """A matrix in 8 bits: ``dense() == q * scale`` in ``dtype``.

    Attributes:
        q: int8, in the shape of the dense array; between -127 and 127.
        scale: float32 ``(*stack, out)``: the step of each output channel.
        layout: Axes of ``q``.
        dense_dtype: Element type of the dense array.
    """

    q: jax.Array
    scale: jax.Array
    layout: Layout
    dense_dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.q.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the dense array."""
        return self.dense_dtype

    def dense(self) -> jax.Array:
        """The dequantized array; its error is at most half a step: ``scale / 2``."""
        matrix = self.layout.matrix(self.q).astype(jnp.float32) * self.scale[..., None, :]
        return self.layout.unmatrix(matrix, self.shape).astype(self.dtype)

    def matmul(self, x: jax.Array, dot: Dot = PLAIN_DOT) -> jax.Array:
        """``x @ dense`` that keeps the int8 matrix for backward, never its dequantized copy."""
        return _matmul(dot)(x, self.layout.matrix(self.q), self.scale)

    def take(self, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Rows of the dense matrix; only these are dequantized."""
        found = rows(jnp.ones((self.layout.sizes(self.shape)[0], 1)))  # NaN where an index has no row
        steps = rows(self.layout.matrix(self.q)).astype(jnp.float32)
        return (steps * jnp.expand_dims(self.scale, range(steps.ndim - 1)) * found).astype(self.dtype)

    def rearranged(self, move: Callable[[jax.Array], jax.Array], layout: Layout) -> "Int8":
        """The weight with ``q`` moved; the scales do not depend on where the axes stand."""
        return dataclasses.replace(self, q=move(self.q), layout=layout)

    def astype(self, dtype: jnp.dtype) -> "Int8":
        """The same integers, standing for an array of another element type."""
        return dataclasses.replace(self, dense_dtype=jnp.dtype(dtype))

    def unstacked(self) -> "Int8":
        """The slice along the first stacked axis."""
        return dataclasses.replace(self, layout=self.layout.unstacked())


def _matmul(dot: Dot) -> Callable[..., jax.Array]:
    """``(x @ q) * scale``, recomputing ``q.astype`` in backward.

    Without the checkpoint, autodiff keeps ``q.astype(x.dtype)`` for the gradient of ``x``: a dense copy of the base.
    """

    @jax.checkpoint
    def product(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
        out = dot.preferred_element_type or x.dtype
        y = jnp.matmul(x, q.astype(x.dtype), precision=dot.precision, preferred_element_type=jnp.float32)
        return (y * jnp.expand_dims(scale, range(y.ndim - 1))).astype(out)

    return product


def quantize_array(array: jax.Array, layout: Layout) -> Int8:
    """Round a matrix to 8 bits, with one scale per output channel (and stacked layer).

    The error is at most half a step: ``abs(dense() - array) <= scale / 2``. Channels of zeros get scale 1.

    Args:
        array: Floating-point array of the shape that ``layout`` describes.
        layout: Its axes; input axes share a scale.

    Raises:
        ValueError: if ``array`` is not floating point or has no input axes.

    Example:
        >>> weight = quantize_array(jnp.array([[1.0, -3.0], [2.0, 0.0]]), Layout())
        >>> weight.q.tolist(), weight.scale.shape
        ([[64, -127], [127, 0]], (2,))
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"quantize takes floating-point weights, found {array.dtype}. Cast the leaf first.")
    if not layout.inp:
        raise ValueError(f"quantize takes matrices, found a vector of shape {array.shape}. Leave it in float.")
    q, scale = _quantize(layout.matrix(array))
    return Int8(layout.unmatrix(q, array.shape), scale, layout, jnp.dtype(array.dtype))


@jax.jit
def _quantize(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    matrix = matrix.astype(jnp.float32)
    largest = jnp.max(jnp.abs(matrix), axis=-2)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(matrix / scale[..., None, :]).astype(jnp.int8), scale


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
