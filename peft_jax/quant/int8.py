"""Int8 weight-only quantization: symmetric, one scale per output channel, scale applied after the product.

The scheme is that of LLM.int8's weights (Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, section 2.1)
without its quantized activations.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.serialized_nodes import register_node
from peft_jax.core.weight import Change, role_specs
from peft_jax.quant.quantized import Quantized, check_array, check_scale

# The smallest step. A smaller one, or its product with 1, could be subnormal, which XLA flushes to zero.
SMALLEST_STEP = 2.0**-125


@partial(register_node, data_fields=("q", "scale"), meta_fields=("layout", "dense_dtype", "unit"))
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """A matrix in 8 bits: ``q * scale * unit``, computed in float32; ``dense()`` rounds it to ``dtype``.

    Attributes:
        q: int8, in the shape of the dense array; between -127 and 127.
        scale: float32 ``(*stack, out)``: the step of each output channel, in units.
        layout: Axes of ``q``.
        dense_dtype: Element type of the dense array.
        unit: What the scales are counted in: 1, or 1/127 of files that hold the largest value of each channel.
    """

    kind: ClassVar[str] = "int8"

    q: jax.Array
    scale: jax.Array
    layout: Layout
    dense_dtype: jnp.dtype
    unit: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return self.q.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the dense array."""
        return self.dense_dtype

    def dense(self) -> jax.Array:
        """The dequantized array: within half a step, ``scale / 2``, and then rounded to ``dtype``."""
        matrix = self.layout.matrix(self.q).astype(jnp.float32) * self.scale[..., None, :]
        matrix = matrix if self.unit == 1 else matrix * self.unit
        return self.layout.unmatrix(matrix, self.shape).astype(self.dtype)

    @property
    def group_size(self) -> None:
        """None: the scales are those of output channels."""
        return None

    @property
    def array(self) -> jax.Array:
        """``q``."""
        return self.q

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with ``q``, then the scales; backward keeps ``q`` and never its dequantized copy."""
        out = product.preferred_element_type or (self.dtype if product.looks_up else x.dtype)
        matrix = self.layout.matrix(self.q)
        steps = self.scale if self.unit == 1 else self.scale * self.unit
        if product.looks_up:
            # Only the rows are dequantized. Where an index has no row they are NaN, which integers have none of.
            found = product.full(x, jnp.ones((len(matrix), 1)))
            return product.scale(product.full(x, matrix).astype(jnp.float32) * found, steps).astype(out)
        # Rounded to bfloat16 before its scales, the product's gradient is one of bfloat16 too. float16 might overflow.
        rounded = x.dtype == out == jnp.bfloat16
        unscaled = product.replace(preferred_element_type=out if rounded else jnp.float32)

        def scaled(x: jax.Array, matrix: jax.Array, scale: jax.Array) -> jax.Array:
            return product.scale(unscaled.full_of_integers(x, matrix), scale)

        # Else autodiff keeps q.astype(x.dtype) for the gradient of x: a dense copy of the base.
        return product.computed_again(scaled, x, matrix, steps).astype(out)

    def astype(self, dtype: jnp.dtype) -> "Int8":
        """The same integers, standing for an array of another element type."""
        return dataclasses.replace(self, dense_dtype=jnp.dtype(dtype))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Int8":
        """The weight with integers and scales changed along a stacked axis."""
        q, scale = change(self.q, self.layout.stack[position]), change(self.scale, position)
        layout = self.layout.unstacked(position) if drop else self.layout
        return dataclasses.replace(self, q=q, scale=scale, layout=layout)

    def requantized(self, array: jax.Array) -> "Int8":
        """Another array of the same shape, rounded to the same format."""
        return quantize_array(array, self.layout).astype(self.dtype)

    def relaid(self, layout: Layout) -> "Int8":
        """The same arrays with another layout."""
        return dataclasses.replace(self, layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> "Int8":
        """Scales are sharded as the outputs are."""
        roles = role_specs(self.layout, entries)
        scale = PartitionSpec(*roles["stack"], *roles["out"])
        return dataclasses.replace(self, q=PartitionSpec(*entries), scale=scale)  # type: ignore[arg-type]


def quantize_array(array: jax.Array, layout: Layout) -> Int8:
    """Round a matrix to 8 bits, with one scale per output channel (and stacked layer).

    The error is at most half a step: ``abs(q * scale - array) <= scale / 2``. Channels of zeros get scale 1. No other
    scale is below 2**-125 (2.4e-38), as a smaller one cannot be represented as a normal float32: weights below half of
    that become zero. Under `jax.jit` the values cannot be looked at; a channel that holds a NaN or an infinity then
    becomes NaN as a whole.

    Args:
        array: Floating-point array of the shape that ``layout`` describes.
        layout: Its axes; input axes share a scale.

    Raises:
        ValueError: if ``array`` is not floating point, has no input axes, or holds values that are not finite in
            float32.

    Example:
        >>> weight = quantize_array(jnp.array([[1.0, -3.0], [2.0, 0.0]]), Layout())
        >>> weight.q.tolist(), weight.scale.shape
        ([[64, -127], [127, 0]], (2,))
    """
    check_array(array, layout)
    q, scale = _quantize(layout.matrix(array))
    check_scale(scale, array)
    return Int8(layout.unmatrix(q, array.shape), scale, layout, jnp.dtype(array.dtype))


@jax.jit
def _quantize(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    matrix = matrix.astype(jnp.float32)
    largest = jnp.max(jnp.abs(matrix), axis=-2)
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(largest / 127, SMALLEST_STEP))  # NaN stays NaN
    return jnp.round(matrix / scale[..., None, :]).astype(jnp.int8), scale
