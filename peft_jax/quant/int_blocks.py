"""Int4's and grouped int8's shared base class: integers with a scale, and perhaps a zero point, by groups of inputs.

As GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) and AWQ (Lin et al., 2023,
https://arxiv.org/abs/2306.00978) store their weights; rounded here to the nearest, symmetrically.
"""

import abc
import dataclasses
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.quant.blockwise import BlockAxes, Blockwise, in_blocks
from peft_jax.quant.quantized import check_array, check_scale

GROUP = 128
SMALLEST_STEP = 2.0**-125  # as of int8 per channel: a smaller one could be subnormal


@dataclasses.dataclass(frozen=True)
class IntBlocks(Blockwise):
    """Integers of few bits: ``(code - zero) * scale``, with scale and zero point of their group.

    Attributes:
        zero: Zero points ``(*stack, groups, out)`` of any integer type; None for the format's own.
        largest: The largest code of the symmetric rounding, less the format's zero point.
        own_zero: The format's zero point.
    """

    zero: jax.Array | None
    largest: ClassVar[int]
    own_zero: ClassVar[int]

    @classmethod
    @abc.abstractmethod
    def stored(cls, codes: jax.Array) -> jax.Array:
        """The packed form of codes ``(*stack, groups, group, out)``."""

    @abc.abstractmethod
    def codes_at(self, row: jax.Array) -> jax.Array:
        """The codes of some inputs, ``(*row.shape, out)``."""

    def values_of(self, codes: jax.Array) -> jax.Array:
        """The codes less their zero points, float32."""
        codes = codes.astype(jnp.float32)
        if self.zero is None:
            return codes - self.own_zero
        between = codes.ndim - self.zero.ndim
        zero = self.zero.reshape(*self.zero.shape[:-1], *(1,) * between, self.zero.shape[-1])
        return codes - zero.astype(jnp.float32)

    def values_at(self, row: jax.Array) -> jax.Array:
        """The codes of some inputs less their zero points, float32."""
        codes = self.codes_at(row).astype(jnp.float32)
        return codes - (self.own_zero if self.zero is None else self.zero[row // self.block].astype(jnp.float32))

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: jax.Array,
        dtype: jnp.dtype | str,
        layout: Layout | None = None,
        *,
        group_size: int = GROUP,
        zero: jax.Array | None = None,
        file_dtype: jnp.dtype | str | None = None,
    ) -> Self:
        """A weight of codes, scales and zero points that are there already, as in a file.

        Args:
            codes: In the shape of the dense array: for int4 from 0 to 15, for int8 from -128 to 127.
            scale: ``(*stack, groups, out)``.
            dtype: Element type of the dense array.
            layout: Its axes; by default those of one matrix ``(in, out)``.
            group_size: Inputs that share a scale; the last group may have fewer.
            zero: Zero points, integers ``(*stack, groups, out)``; None for 8 of int4, and 0 of int8.
            file_dtype: Element type that the values are rounded to first; None for none.

        Example:
            >>> from peft_jax.quant import Int4
            >>> zero = jnp.array([[1]], jnp.uint8)
            >>> weight = Int4.from_codes(jnp.array([[0], [15]]), jnp.array([[0.5]]), "float32", group_size=2, zero=zero)
            >>> weight.dense().ravel().tolist()
            [-0.5, 7.0]
        """
        layout = Layout() if layout is None else layout
        axes = BlockAxes.of(codes.shape, layout, group_size)
        packed = cls.stored(in_blocks(layout.matrix(codes), group_size))
        scale, first = jnp.asarray(scale, jnp.float32), None if file_dtype is None else jnp.dtype(file_dtype)
        return cls(packed, scale, layout, jnp.dtype(dtype), axes, None, zero, file_dtype=first)

    @classmethod
    def of(cls, array: jax.Array, layout: Layout, *, group_size: int = GROUP) -> Self:
        """Round a matrix to the nearest integers, with one scale for each group of inputs of an output channel.

        The error is at most half a step, ``scale / 2``.

        Args:
            array: Floating-point array of the shape that ``layout`` describes.
            layout: Its axes.
            group_size: Inputs that share a scale; the last group may have fewer.

        Raises:
            ValueError: if ``array`` is not floating point, has no input axes, or holds values that are not finite.
        """
        check_array(array, layout)
        if group_size < 2 or group_size % 2:
            raise ValueError(f"{cls.kind} has groups of an even number of inputs, got group_size={group_size}.")
        codes, scale = _rounded(in_blocks(layout.matrix(array), group_size), cls.largest, cls.own_zero)
        check_scale(scale, array)
        axes = BlockAxes.of(array.shape, layout, group_size)
        return cls(cls.stored(codes), scale, layout, jnp.dtype(array.dtype), axes, None, None)

    def requantized(self, array: jax.Array) -> Self:
        """Another array of the same shape, rounded symmetrically in the same groups."""
        return self.of(array, self.layout, group_size=self.group_size).astype(self.dtype)

    def specs(self, entries: tuple[Any, ...]) -> Self:
        """Zero points are sharded as the scales."""
        specs = super().specs(entries)
        zero: Any = None if self.zero is None else specs.scale
        return dataclasses.replace(specs, zero=zero)


@partial(jax.jit, static_argnames=("largest", "zero"))
def _rounded(blocks: jax.Array, largest: int, zero: int) -> tuple[jax.Array, jax.Array]:
    found = jnp.max(jnp.abs(blocks), axis=-2)
    scale = jnp.where(found == 0, 1.0, jnp.maximum(found / largest, SMALLEST_STEP))  # NaN stays NaN
    return jnp.round(blocks / scale[..., None, :]) + zero, scale
