"""The table of formats: from a kind and its options to the weights of arrays."""

import dataclasses

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.quant.float_blocks import BLOCK, BLOCKS, FloatBlocks
from peft_jax.quant.fp4 import FP4
from peft_jax.quant.int4 import Int4
from peft_jax.quant.int8 import quantize_array
from peft_jax.quant.int8_groups import Int8Groups
from peft_jax.quant.int_blocks import GROUP, IntBlocks
from peft_jax.quant.nf4 import NF4
from peft_jax.quant.quantized import Quantized

FLOATS: dict[str, type[FloatBlocks]] = {"nf4": NF4, "fp4": FP4}
INTEGERS: dict[str, type[IntBlocks]] = {"int4": Int4, "int8": Int8Groups}
KINDS = (*FLOATS, *INTEGERS)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A format with its options; calling it rounds an array.

    Attributes:
        kind: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"int8"``.
        group_size: Elements that share a scale; None for 64 of nf4 and fp4, 128 of int4, and all inputs of an output
            channel of int8.
        double_quant: Whether the scales of nf4 and fp4 are rounded to 8 bits too.
        compute_dtype: Element type that products with nf4 and fp4 have; None for that of the inputs.

    Raises:
        ValueError: if there is no such format, or it has no such option.

    Example:
        >>> Quantizer("nf4")(jnp.ones((64, 2)), Layout()).packed.shape
        (1, 32, 2)
    """

    kind: str
    group_size: int | None = None
    double_quant: bool = False
    compute_dtype: jnp.dtype | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not supported. Write one of {', '.join(KINDS)}.")
        is_float, size = self.kind in FLOATS, self.group_size
        if self.double_quant and not is_float:
            raise ValueError(f"double_quant=True is an option of nf4 and fp4, not of {self.kind}. Leave it out.")
        if is_float and size not in (None, *BLOCKS):
            raise ValueError(f"{self.kind} has a group_size of {', '.join(map(str, BLOCKS))}, got {size!r}.")
        if size is not None and (not isinstance(size, int) or size < 2 or size % 2):
            raise ValueError(f"group_size is an even number of inputs, got {size!r}.")

    @property
    def size(self) -> int | None:
        """The group size with the format's default filled in."""
        if self.group_size is not None:
            return self.group_size
        return {"int8": None, "int4": GROUP}.get(self.kind, BLOCK)

    def __call__(self, array: jax.Array, layout: Layout) -> Quantized:
        """The array in this format.

        Raises:
            ValueError: if it is not floating point, has no input axes, or holds values that are not finite.
        """
        if self.kind in FLOATS:
            return FLOATS[self.kind].of(
                array,
                layout,
                block=self.size or BLOCK,
                double_quant=self.double_quant,
                compute_dtype=self.compute_dtype,
            )
        if self.size is None:
            return quantize_array(array, layout)
        return INTEGERS[self.kind].of(array, layout, group_size=self.size)

    def without_double_quant(self) -> "Quantizer":
        """The same with scales in float32: those of a part of a matrix are not rounded without the rest."""
        return dataclasses.replace(self, double_quant=False)
