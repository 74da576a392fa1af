"""Scales that are quantized themselves: 8 bits each, with one float for each 256 of them and their mean.

Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, section 3 ("double quantization"); the 256 values are those of
Dettmers, 2015, https://arxiv.org/abs/1511.04561. Both as bitsandbytes has them.
"""

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from peft_jax.core.serialized_nodes import register_node

BLOCK = 256
LARGEST = float(np.finfo(np.float32).max)


def _dynamic_values() -> np.ndarray:
    """The 256 values: for each power of ten a number of means of equal steps, and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(2**i + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (i - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> np.ndarray:
    """From 0.1 to 1 as ``torch.linspace`` gives them in float32: from both ends, product and sum rounded once."""
    first, last, number = np.float32(0.1), np.float32(1), np.arange(count)
    step = np.float64((last - first) / np.float32(count - 1))
    from_first = np.float64(first) + step * number
    from_last = np.float64(last) - step * (count - 1 - number)
    return np.where(number < count // 2, from_first, from_last).astype(np.float32)


VALUES = _dynamic_values()


@partial(register_node, data_fields=("codes", "largest", "offset"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class DoubleScale:
    """Scales as ``VALUES[codes] * largest + offset``.

    Attributes:
        codes: uint8, in the shape of the scales: ``(*stack, blocks, out)``, or ``(*stack, n)`` of blocks that run on.
        largest: float32 ``(*stack, n)``: of each 256 scales in bitsandbytes' order, the blocks of one output channel
            one after the other and then those of the next.
        offset: float32 ``(*stack,)``: the mean of the scales.
    """

    codes: jax.Array
    largest: jax.Array
    offset: jax.Array

    def dense(self) -> jax.Array:
        """The scales, float32."""
        shape = self.codes.shape[self.offset.ndim :]
        order = np.arange(np.prod(shape)).reshape(shape[::-1]).T // BLOCK
        product = jnp.asarray(VALUES)[self.codes] * jnp.take(self.largest, order, axis=-1, mode="clip")
        # bitsandbytes rounds the product. This keeps compilers from fusing it with the sum, which would not.
        product = jnp.clip(product, -LARGEST, LARGEST)
        return product + self.offset.reshape(*self.offset.shape, *(1,) * len(shape))

    def specs(self, codes: PartitionSpec) -> Self:
        """Codes are sharded as the scales would be, and the rest by stacked axes alone."""
        stack = tuple(codes)[: self.offset.ndim]
        parts: dict[str, Any] = {
            "codes": codes,
            "largest": PartitionSpec(*stack, None),
            "offset": PartitionSpec(*stack),
        }
        return dataclasses.replace(self, **parts)


@partial(jax.jit, static_argnames="stacked")
def double_quantize(scale: jax.Array, stacked: int, offset: Any = None) -> DoubleScale:
    """Round scales to 8 bits.

    Args:
        scale: float32 ``(*stack, blocks, out)`` or ``(*stack, n)``.
        stacked: The number of stacked axes; each layer is rounded by itself.
        offset: ``(*stack,)``; None for the mean. bitsandbytes' own mean may differ in its last bit, as its sums are
            taken in another order on each device.

    Example:
        >>> scale = jnp.array([[1.0, 1.5, 2.0]])
        >>> double_quantize(scale, 0).dense().round(2).tolist()
        [[1.0, 1.5, 2.0]]
    """
    stack, shape = scale.shape[:stacked], scale.shape[stacked:]
    order = jnp.swapaxes(scale, -1, -2) if len(shape) == 2 else scale
    flat = order.reshape(*stack, -1)
    mean = jnp.mean(flat, axis=-1) if offset is None else jnp.asarray(offset, jnp.float32)
    count = flat.shape[-1]
    padding = [(0, 0)] * stacked + [(0, -count % BLOCK)]
    blocks = jnp.pad(flat - mean[..., None], padding).reshape(*stack, -1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    inverse = jnp.where(largest == 0, 0, 1 / jnp.where(largest == 0, 1, largest))
    codes = _nearest(blocks * inverse[..., None]).reshape(*stack, -1)[..., :count]
    codes = codes.reshape(order.shape)
    return DoubleScale(jnp.swapaxes(codes, -1, -2) if len(shape) == 2 else codes, largest, mean)


def _nearest(array: jax.Array) -> jax.Array:
    """The number of the nearest of the values, uint8."""
    middle = (VALUES[1:] + VALUES[:-1]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(middle), array).astype(jnp.uint8)
