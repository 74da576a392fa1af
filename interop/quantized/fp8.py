"""fp8 weights with scales by block, row or tensor: transformers' "fp8" (``weight_scale_inv``) and FBGEMM's.

``weight = fp8 * scale`` in float32, which transformers then rounds to the model's element type. Scales are floats, or
powers of two by their exponents (E8M0, in bytes too).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from peft_jax.interop.quantized.base import (
    FLOAT32,
    FLOATS,
    UINT8,
    Array,
    Blocks,
    QuantizedTensor,
    Settings,
    StoredTensors,
    damaged,
    scaled_by_rows,
)

FP8 = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))
EXPONENTS = np.dtype(jnp.float8_e8m0fnu)
EXPONENT_BIAS = 127
SCALES = ("weight_scale_inv", "weight_scale")  # transformers' name, and FBGEMM's and vLLM's
ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FP8Tensor(QuantizedTensor):
    """A matrix in fp8.

    Attributes:
        values: fp8 ``(out, in)``.
        scale: ``(blocks of out, blocks of in)``: floats, or exponents in uint8 or E8M0.
        block: Elements of a block along both axes; the last ones may be cut off.
    """

    values: Array
    scale: Array
    block: tuple[int, int]

    def scales(self) -> Array:
        """The scales in float32."""
        if self.scale.dtype in (UINT8, EXPONENTS):
            exponents = self.scale.view(np.uint8).astype(np.int32) - EXPONENT_BIAS
            return np.ldexp(np.float32(1), exponents)
        return self.scale.astype(np.float32)

    def dequantize(self) -> Array:
        """The values times the scales of their blocks, in float32."""
        scales = Blocks.of(self.scales(), self.shape, self.block)
        return scaled_by_rows(self, lambda rows: self.values[rows], scales)


def read_fp8(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights in fp8.

    Raises:
        ValueError: A tensor is missing or does not fit the others.
    """
    block = settings.get("weight_block_size")
    for key in [key for key, tensor in stored.left.items() if tensor.dtype in FP8]:
        values = stored.take(key, FP8)
        module, _, name = key.rpartition(".")
        if name != "weight" or values.ndim != 2:
            raise damaged(key, f"is {values.dtype} of shape {values.shape}: weights that are matrices alone are read")
        names = [f"{module}.{one}" for one in SCALES]
        scale_key = next((one for one in names if one in stored.left), names[0])
        scale = stored.take(scale_key, [*FLOATS, UINT8, EXPONENTS])
        grid, size = _blocks(scale_key, scale.shape, values.shape, block)
        yield FP8Tensor(
            key=key, shape=values.shape, dtype=FLOAT32, values=values, scale=scale.reshape(grid), block=size
        )
    stored.quantizes_activations = True
    stored.drop_activations(ACTIVATIONS)


def _blocks(
    key: str, found: tuple[int, ...], shape: tuple[int, ...], block: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many blocks of what size there are: one, one a row, or those of ``weight_block_size``."""
    outputs, inputs = shape
    if block is not None:
        height, width = (int(size) for size in block)
        grid = (-(-outputs // height), -(-inputs // width))
        if found == grid:
            return grid, (height, width)
    if found in ((), (1,), (1, 1)):
        return (1, 1), (outputs, inputs)
    if found in ((outputs,), (outputs, 1)):
        return (outputs, 1), (1, inputs)
    rule = "one for the tensor, or one for each row" if block is None else f"one for each block of {list(block)}"
    advice = "Correct weight_block_size in config.json, or take an undamaged copy of the checkpoint."
    raise damaged(key, f"has shape {found}, and the weight {shape} takes {rule}", advice)
