"""Int8 by groups: as int8 per channel, with one scale for each group of inputs of an output channel."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.core.serialized_nodes import register_node
from peft_jax.quant.int_blocks import IntBlocks


@partial(
    register_node,
    data_fields=("packed", "scale", "zero"),
    meta_fields=("layout", "dense_dtype", "axes", "compute_dtype", "file_dtype"),
)
@dataclasses.dataclass(frozen=True)
class Int8Groups(IntBlocks):
    """A matrix in 8 bits by groups; ``packed`` is int8 ``(*stack, groups, group, out)``.

    Example:
        >>> import peft_jax as pj
        >>> weight = Int8Groups.of(jnp.array([[127.0], [-3.0], [1.0], [0.5]]), pj.Layout(), group_size=2)
        >>> weight.packed.shape, weight.scale.shape
        ((2, 2, 1), (2, 1))
    """

    kind: ClassVar[str] = "int8"
    largest: ClassVar[int] = 127
    own_zero: ClassVar[int] = 0

    @property
    def block(self) -> int:
        """Inputs in a group."""
        return self.packed.shape[-2]

    @classmethod
    def stored(cls, codes: jax.Array) -> jax.Array:
        """The codes as int8."""
        return codes.astype(jnp.int8)

    def codes(self) -> jax.Array:
        """The codes, int8 ``(*stack, groups, group, out)``."""
        return self.packed

    def codes_at(self, row: jax.Array) -> jax.Array:
        """The codes of some inputs, int8 ``(*row.shape, out)``."""
        return self.packed.reshape(-1, self.packed.shape[-1])[row]
