"""Matrices whose elements share a scale by blocks of the inputs: what all such formats have in common.

The packed array is ``(*stack, blocks, rows, out)``: a block's inputs are an axis of their own, so that compilers fuse
the dequantization into a product that contracts both axes. `peft_jax.core.product.Product.full_in_blocks` does.
"""

import abc
import dataclasses
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import PartitionSpec

from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.selecting import picked
from peft_jax.core.weight import Change, role_specs
from peft_jax.quant.double_scale import DoubleScale
from peft_jax.quant.quantized import Quantized
from peft_jax.quant.rounded_to import rounded_to


class BlockAxes(NamedTuple):
    """The sizes of the dense array that the packed one does not say.

    Attributes:
        padding: Rows of zeros after the last input, which fill the last block.
        inner_in: Lengths of the input axes after the first.
        inner_out: Lengths of the output axes after the first.
        running: 0, or the length of blocks that run on from one output channel to the next, as bitsandbytes has them
            where it does not divide the inputs. The packed array then has one block, and scales are ``(*stack, n)``.
    """

    padding: int = 0
    inner_in: tuple[int, ...] = ()
    inner_out: tuple[int, ...] = ()
    running: int = 0

    @classmethod
    def of(cls, shape: tuple[int, ...], layout: Layout, block: int, *, runs_on: bool = False) -> Self:
        """The axes of an array of this shape in blocks of so many inputs."""
        n_in, _ = layout.sizes(shape)
        inner_in = picked(shape, layout.inp[1:])
        inner_out = picked(shape, layout.out[1:])
        if runs_on and n_in % block:
            return cls(n_in % 2, inner_in, inner_out, block)
        return cls(-n_in % block, inner_in, inner_out)


@dataclasses.dataclass(frozen=True)
class Blockwise(Quantized):
    """A matrix of numbers of few bits, in blocks of its inputs: a number's value times the scale of its block.

    Attributes:
        packed: ``(*stack, blocks, rows, out)``; two numbers of 4 bits in a byte, see `peft_jax.quant.nibbles`.
        scale: float32 ``(*stack, blocks, out)``, or a `DoubleScale` that stands for it.
        layout: Axes of the dense array.
        dense_dtype: Element type of the dense array.
        axes: Sizes of the dense array that ``packed`` does not say.
        compute_dtype: Element type that inputs and the dequantized matrix have in products; None for the inputs' own.
        file_dtype: Element type that the values are rounded to before any other, as the reader of the file that they
            are from does; None for none.
    """

    packed: jax.Array
    scale: jax.Array | DoubleScale
    layout: Layout
    dense_dtype: jnp.dtype
    axes: BlockAxes
    compute_dtype: jnp.dtype | None
    file_dtype: jnp.dtype | None = dataclasses.field(default=None, kw_only=True)

    @abc.abstractmethod
    def codes(self) -> jax.Array:
        """The numbers as they are stored, one an element: ``(*stack, blocks, ..., out)``, a block's inputs between."""

    @abc.abstractmethod
    def values_of(self, codes: jax.Array) -> jax.Array:
        """The values that codes of all blocks, or of some rows of each, stand for without scales: float32."""

    def code_parts(self) -> tuple[jax.Array, ...]:
        """The codes by rows of each block, in order: arrays ``(*stack, blocks, rows, out)``."""
        return (self.codes(),)

    @abc.abstractmethod
    def values_at(self, row: jax.Array) -> jax.Array:
        """The numbers of some inputs, float32 ``(*row.shape, out)``; no stacked axes."""

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Inputs in a block of ``packed``."""

    @property
    def group_size(self) -> int:
        """Elements that share a scale."""
        return self.axes.running or self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        *stack, blocks, _, n_out = self.packed.shape
        axes, layout = self.axes, self.layout
        n_in = blocks * self.block - axes.padding
        inp = (n_in // math.prod(axes.inner_in), *axes.inner_in)
        out = (n_out // math.prod(axes.inner_out), *axes.inner_out)
        sizes = dict(zip((*layout.inp, *layout.out), (*inp, *out), strict=True))
        if len(stack) != len(layout.stack):  # between the slices of a loop: what is left of the stack stands in front
            return (*stack, *(sizes[axis] for axis in sorted(sizes)))
        sizes.update(zip(layout.stack, stack, strict=True))
        return tuple(sizes[axis] for axis in range(len(sizes)))

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the dense array."""
        return self.dense_dtype

    @property
    def array(self) -> jax.Array:
        """``packed``, whose axes `entries` translates."""
        return self.packed

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the dense array: ``packed`` has fewer elements."""
        return self.shape

    @property
    def in_pieces(self) -> bool:
        """Whether no block belongs to several output channels."""
        return not self.axes.running

    def entries(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """The entry of each axis of the dense array, given those of ``packed``."""
        whole: list[Any] = [*spec, *(None,) * (self.packed.ndim - len(spec))]
        *stack, inp, _, out = whole
        entries = dict.fromkeys(range(len(self.layout.order)))
        entries.update(zip(self.layout.stack, stack, strict=True))
        entries[self.layout.inp[0]], entries[self.layout.out[0]] = inp, out
        return tuple(entries.values())

    def scales(self) -> jax.Array:
        """The scales, float32."""
        return self.scale.dense() if isinstance(self.scale, DoubleScale) else self.scale

    def blocks(self) -> jax.Array:
        """The dequantized matrix in the axes of `codes`, float32."""
        return self._scaled(self.values_of(self.codes()))

    def _scaled(self, values: jax.Array) -> jax.Array:
        """Values of all blocks, or of some rows of each, times their scales."""
        scales = self.scales()
        if self.axes.running:
            inputs, outputs = np.arange(self.block), np.arange(values.shape[-1])
            place = self._running_place(inputs[:, None], outputs[None])
            products = values * jnp.take(scales, place, axis=-1, mode="clip").reshape(values.shape)
            return rounded_to(products, self.file_dtype)
        between = values.ndim - scales.ndim
        products = values * scales.reshape(*scales.shape[:-1], *(1,) * between, scales.shape[-1])
        return rounded_to(products, self.file_dtype)

    def _running_place(self, inputs: Any, outputs: Any) -> Any:
        """Which of the blocks that run on an element is in."""
        n_in = self.block - self.axes.padding
        return (outputs * n_in + inputs) // self.axes.running

    def matrix(self) -> jax.Array:
        """The dequantized matrix, float32 ``(*stack, in, out)``."""
        blocks = self.blocks()
        stack, n_out = self.packed.shape[:-3], self.packed.shape[-1]
        matrix = blocks.reshape(*stack, -1, n_out)
        return matrix[..., : matrix.shape[-2] - self.axes.padding, :]

    def rows(self, row: jax.Array) -> jax.Array:
        """Some rows of the dequantized matrix, float32 ``(*row.shape, out)``; no stacked axes."""
        values, scales = self.values_at(row), self.scales()
        if self.axes.running:
            outputs = jnp.arange(values.shape[-1]).reshape(*(1,) * row.ndim, -1)
            return rounded_to(values * scales[self._running_place(row[..., None], outputs)], self.file_dtype)
        return rounded_to(values * scales[row // self.block], self.file_dtype)

    def dense(self) -> jax.Array:
        """The dequantized array: value times scale in float32, and then rounded to ``dtype``."""
        return self.layout.unmatrix(self.matrix(), self.shape).astype(self.dtype)

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with the dequantized matrix, which backward makes again from the packed one."""
        out = product.preferred_element_type or (self.dtype if product.looks_up else x.dtype)
        if product.looks_up:
            n_in = self.packed.shape[-3] * self.block - self.axes.padding
            found = product.full(x, jnp.ones((n_in, 1)))  # NaN where an index has no row
            return (self.rows(jnp.clip(x, 0, n_in - 1)) * found).astype(out)
        compute = self.compute_dtype or x.dtype

        def multiplied(x: jax.Array, weight: Blockwise) -> jax.Array:
            if weight.axes.padding or weight.packed.ndim > 3:
                return product.full(x, weight.matrix().astype(compute))
            if weight.axes.running or not product.is_plain:
                return at_once(x, weight)
            return jax.lax.platform_dependent(x, weight, tpu=in_parts, default=at_once)

        def at_once(x: jax.Array, weight: Blockwise) -> jax.Array:
            return product.full_in_blocks(x, weight.blocks().astype(compute))

        def in_parts(x: jax.Array, weight: Blockwise) -> jax.Array:
            return weight.product_in_parts(x, product, compute)

        # Else autodiff keeps the dequantized matrix for the gradient of x: a dense copy of the base.
        return product.computed_again(multiplied, x.astype(compute), self).astype(out)

    def product_in_parts(self, x: jax.Array, product: Product, compute: jnp.dtype) -> jax.Array:
        """The product as a sum over the parts of the blocks, in float32.

        The TPU's compiler fuses the dequantization of one part into its product. That of all parts of a byte it writes
        to memory first.

        Args:
            x: ``(..., in)``.
            product: The product of each part.
            compute: Element type of the dequantized parts.
        """
        # The product is fused if the rows of a block are the first axis in memory. Left alone, the TPU's compiler
        # copies the codes of all layers into that order before the scan over layers. The first constraint keeps the
        # stack in its own order, so that a layer is copied when it is used. The second asks for the order of the
        # product: without it the compiler writes the dequantized weight.
        packed = with_layout_constraint(self.packed, DeviceLayout((0, 1, 2)))
        packed = with_layout_constraint(packed, DeviceLayout((1, 0, 2)))
        codes = dataclasses.replace(self, packed=packed).code_parts()
        parts = x.reshape(*x.shape[:-1], self.packed.shape[-3], len(codes), -1)
        out = product.preferred_element_type or x.dtype
        summed = product.replace(preferred_element_type=jnp.float32 if jnp.finfo(out).bits < 32 else out)
        results = []
        for number, part in enumerate(codes):
            rows = parts[..., number, :].reshape(*x.shape[:-1], -1)
            results.append(summed.full_in_blocks(rows, self._scaled(self.values_of(part)).astype(compute)))
        return sum(results[1:], results[0]).astype(out)

    def astype(self, dtype: jnp.dtype) -> Self:
        """The same numbers, standing for an array of another element type."""
        return dataclasses.replace(self, dense_dtype=jnp.dtype(dtype))

    def mapped(self, position: int, change: Change, *, drop: bool) -> Self:
        """The weight with all arrays changed along a stacked axis; those come first in each of them."""
        changed = jax.tree.map(lambda array: change(array, position), self)
        layout = self.layout.unstacked(position) if drop else self.layout
        return dataclasses.replace(changed, layout=layout)

    def relaid(self, layout: Layout) -> Self:
        """The same arrays with another layout."""
        return dataclasses.replace(self, layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> Self:
        """Blocks are sharded as the inputs are, and scales as the blocks."""
        roles = role_specs(self.layout, entries)
        stack, inp, out = roles["stack"], roles["in"], roles["out"]
        if self.axes.running:
            packed, scale = PartitionSpec(*stack, None, None, *out), PartitionSpec(*stack, None)
        else:
            packed, scale = PartitionSpec(*stack, *inp, None, *out), PartitionSpec(*stack, *inp, *out)
        parts: dict[str, Any] = {"packed": packed, "scale": scale}
        if isinstance(self.scale, DoubleScale):
            parts["scale"] = self.scale.specs(scale)
        return dataclasses.replace(self, **parts)


def in_blocks(matrix: jax.Array, block: int) -> jax.Array:
    """A matrix ``(*stack, in, out)`` as float32 ``(*stack, blocks, block, out)``, with zeros after the last input."""
    *stack, n_in, n_out = matrix.shape
    padding = [(0, 0)] * len(stack) + [(0, -n_in % block), (0, 0)]
    return jnp.pad(matrix.astype(jnp.float32), padding).reshape(*stack, -1, block, n_out)
