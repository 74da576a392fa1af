"""NF4's and FP4's shared base class: 4-bit numbers that stand for 16 values, scaled by the largest of each block.

Numbers, packing of values to numbers, and rounding are bitsandbytes', to the last bit.
"""

import dataclasses
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.pytree import PyTree
from peft_jax.quant.blockwise import BlockAxes, Blockwise, in_blocks
from peft_jax.quant.double_scale import DoubleScale, double_quantize
from peft_jax.quant.nibbles import halves, pack, unpack, unpacked_at
from peft_jax.quant.quantized import check_array, check_scale

BLOCK = 64
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those of bitsandbytes
SMALLEST = float(np.finfo(np.float32).tiny)  # bitsandbytes' 1e-38 is subnormal, which XLA flushes to zero


@dataclasses.dataclass(frozen=True)
class FloatBlocks(Blockwise):
    """Numbers from 0 to 15 that stand for the values of a table.

    Attributes:
        table: The values, from -1 to 1, by their numbers.
    """

    table: ClassVar[tuple[float, ...]]

    @property
    def block(self) -> int:
        """Inputs in a block of ``packed``."""
        return 2 * self.packed.shape[-2]

    def codes(self) -> jax.Array:
        """The numbers, uint8 ``(*stack, blocks, 2, rows, out)``."""
        return unpack(self.packed)

    def code_parts(self) -> tuple[jax.Array, ...]:
        """The numbers of the first half of each block, and of the second."""
        return halves(self.packed)

    def values_of(self, codes: jax.Array) -> jax.Array:
        """The table's values, float32."""
        return _look_up(codes, self.table)

    def values_at(self, row: jax.Array) -> jax.Array:
        """The values of some inputs, float32 ``(*row.shape, out)``."""
        return _look_up(unpacked_at(self.packed, row), self.table)

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: jax.Array | DoubleScale,
        dtype: jnp.dtype | str,
        layout: Layout | None = None,
        *,
        block: int = BLOCK,
        compute_dtype: jnp.dtype | str | None = None,
        file_dtype: jnp.dtype | str | None = None,
    ) -> Self:
        """A weight of numbers and scales that are there already, as in a file.

        Args:
            codes: Numbers from 0 to 15 by the format's table, in the shape of the dense array.
            scale: The largest absolute value of each block: ``(*stack, blocks, out)`` if ``block`` divides the inputs,
                else ``(*stack, n)`` of blocks that run on from one output channel to the next. Or a `DoubleScale`.
            dtype: Element type of the dense array.
            layout: Its axes; by default those of one matrix ``(in, out)``.
            block: Elements that share a scale.
            compute_dtype: Element type of products; None for that of the inputs.
            file_dtype: Element type that the values are rounded to first; None for none.

        Example:
            >>> from peft_jax.quant import NF4
            >>> NF4.from_codes(jnp.array([[0], [15]]), jnp.array([2.0]), "float32").dense().ravel().tolist()
            [-2.0, 2.0]
        """
        layout = Layout() if layout is None else layout
        matrix = layout.matrix(jnp.asarray(codes, jnp.uint8))
        axes = BlockAxes.of(codes.shape, layout, block, runs_on=True)
        length = matrix.shape[-2] + axes.padding if axes.running else block
        packed = pack(_padded_blocks(matrix, length))
        compute = None if compute_dtype is None else jnp.dtype(compute_dtype)
        first = None if file_dtype is None else jnp.dtype(file_dtype)
        return cls(packed, scale, layout, jnp.dtype(dtype), axes, compute, file_dtype=first)

    @classmethod
    def of(
        cls,
        array: jax.Array,
        layout: Layout,
        *,
        block: int = BLOCK,
        double_quant: bool = False,
        compute_dtype: jnp.dtype | None = None,
    ) -> Self:
        """Round a matrix as bitsandbytes does.

        Args:
            array: Floating-point array of the shape that ``layout`` describes.
            layout: Its axes.
            block: Elements that share a scale, one after another along the inputs. Where it does not divide these,
                blocks run on from one output channel to the next, and the last one is shorter.
            double_quant: Whether the scales are rounded to 8 bits too.
            compute_dtype: Element type of products; None for that of the inputs.

        Raises:
            ValueError: if ``array`` is not floating point, has no input axes, or holds values that are not finite; or
                ``block`` is none of bitsandbytes'.
        """
        check_array(array, layout)
        if block not in BLOCKS:
            raise ValueError(f"{cls.kind} has blocks of {', '.join(map(str, BLOCKS))} elements, got {block}.")
        matrix = layout.matrix(array).astype(jnp.float32)
        n_in, n_out = matrix.shape[-2:]
        axes = BlockAxes.of(array.shape, layout, block, runs_on=True)
        if axes.running:
            flat = jnp.swapaxes(matrix, -1, -2).reshape(*matrix.shape[:-2], n_in * n_out, 1)
            found, largest = _rounded(in_blocks(flat, block), cls.table, n_in * n_out % block)
            found = found.reshape(*flat.shape[:-2], -1)[..., : n_in * n_out]
            codes = jnp.swapaxes(found.reshape(*matrix.shape[:-2], n_out, n_in), -1, -2)
            packed, scale = pack(_padded_blocks(codes, n_in + axes.padding)), largest[..., 0]
        else:
            codes, scale = _rounded(in_blocks(matrix, block), cls.table, 0)
            packed = pack(codes)
        check_scale(scale, array)
        weight = cls(packed, scale, layout, jnp.dtype(array.dtype), axes, compute_dtype)
        return weight.double_quantized() if double_quant else weight

    def double_quantized(self) -> Self:
        """The weight with its scales rounded to 8 bits."""
        if isinstance(self.scale, DoubleScale):
            return self
        return dataclasses.replace(self, scale=double_quantize(self.scale, self.packed.ndim - 3))

    def requantized(self, array: jax.Array) -> Self:
        """Another array of the same shape, rounded to the same format with the same options."""
        rounded = self.of(
            array,
            self.layout,
            block=self.group_size,
            double_quant=isinstance(self.scale, DoubleScale),
            compute_dtype=self.compute_dtype,
        )
        return rounded.astype(self.dtype)


def _padded_blocks(codes: jax.Array, block: int) -> jax.Array:
    """Numbers ``(*stack, in, out)`` in blocks, with zeros after the last input."""
    return in_blocks(codes, block).astype(jnp.uint8)


def _look_up(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """The table's values of numbers: a gather, but on TPUs, which have none in their vector units, choices by bits."""
    values = np.array(table, np.float32)

    def gathered(codes: jax.Array) -> jax.Array:
        return jnp.asarray(values)[codes]

    def chosen(codes: jax.Array) -> jax.Array:
        left = list(values)
        for bit in range(4):
            is_set = (codes >> bit) & 1 != 0
            left = [jnp.where(is_set, high, low) for low, high in zip(left[::2], left[1::2], strict=True)]
        return left[0]

    found: jax.Array = jax.lax.platform_dependent(codes, tpu=chosen, default=gathered)
    return found


def double_quantized(tree: PyTree) -> PyTree:
    """A tree whose nf4 and fp4 leaves have their scales rounded to 8 bits.

    Example:
        >>> from peft_jax.quant import NF4
        >>> weight = double_quantized([NF4.of(jnp.ones((64, 2)), Layout())])[0]
        >>> weight.scale.codes.shape, weight.dense().dtype
        ((1, 2), dtype('float32'))
    """
    rounded = jax.jit(lambda leaf: leaf.double_quantized())
    return jax.tree.map(lambda leaf: rounded(leaf) if _is_float(leaf) else leaf, tree, is_leaf=_is_float)


def _is_float(node: PyTree) -> bool:
    return isinstance(node, FloatBlocks)


@partial(jax.jit, static_argnames=("table", "last"))
def _rounded(blocks: jax.Array, table: tuple[float, ...], last: int) -> tuple[jax.Array, jax.Array]:
    """Numbers and largest values of ``(*stack, blocks, block, out)``; ``last`` elements in the last block, 0 for all.

    A block's elements are multiplied by a reciprocal, but those of a shorter last one divided, as bitsandbytes does.
    """
    values = np.array(table, np.float32)
    order = np.argsort(values, kind="stable")
    middle = (values[order[:-1]] + values[order[1:]]) / np.float32(2)
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    divisor = jnp.maximum(largest, SMALLEST)[..., None, :]
    scaled = blocks * (1 / divisor)
    if last:
        scaled = scaled.at[..., -1, :, :].set(blocks[..., -1, :, :] / divisor[..., -1, :, :])
    place = jnp.zeros(blocks.shape, jnp.uint8)
    for edge in middle:  # a comparison each, which compilers fuse; a search would be a loop
        place += (scaled > edge).astype(jnp.uint8)
    return jnp.asarray(order.astype(np.uint8))[place], largest
