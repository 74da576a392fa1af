"""Int4 by groups: 16 integers, two in a byte, with one scale for each 128 inputs of an output channel."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax

from peft_jax.core.serialized_nodes import register_node
from peft_jax.quant.int_blocks import IntBlocks
from peft_jax.quant.nibbles import halves, pack, unpack, unpacked_at


@partial(
    register_node,
    data_fields=("packed", "scale", "zero"),
    meta_fields=("layout", "dense_dtype", "axes", "compute_dtype", "file_dtype"),
)
@dataclasses.dataclass(frozen=True)
class Int4(IntBlocks):
    """A matrix in 4 bits; codes are from 0 to 15, and 8 stands for zero where no zero points say otherwise.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> weight = Int4.of(jnp.array([[0.5], [-7.0], [3.0], [2.0]]), pj.Layout())
        >>> weight.packed.shape, weight.dense().ravel().tolist()
        ((1, 64, 1), [0.0, -7.0, 3.0, 2.0])
    """

    kind: ClassVar[str] = "int4"
    largest: ClassVar[int] = 7
    own_zero: ClassVar[int] = 8

    @property
    def block(self) -> int:
        """Inputs in a group."""
        return 2 * self.packed.shape[-2]

    @classmethod
    def stored(cls, codes: jax.Array) -> jax.Array:
        """Two codes in a byte."""
        return pack(codes)

    def codes(self) -> jax.Array:
        """The codes, uint8 ``(*stack, groups, 2, rows, out)``."""
        return unpack(self.packed)

    def code_parts(self) -> tuple[jax.Array, ...]:
        """The codes of the first half of each group, and of the second."""
        return halves(self.packed)

    def codes_at(self, row: jax.Array) -> jax.Array:
        """The codes of some inputs, uint8 ``(*row.shape, out)``."""
        return unpacked_at(self.packed, row)
