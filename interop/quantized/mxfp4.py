"""MXFP4 as transformers saves experts in it: ``NAME_blocks`` and ``NAME_scales`` for a parameter ``NAME``.

A block is 32 floats of 4 bits (E2M1) in 16 bytes, the first of two in the low half, with a power of two in common whose
exponent is a byte (E8M0). https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from peft_jax.interop.quantized.base import (
    BFLOAT16,
    UINT8,
    Array,
    QuantizedTensor,
    Settings,
    StoredTensors,
    by_rows,
    damaged,
    unpack,
)

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*MAGNITUDES, *(-one for one in MAGNITUDES)], np.float32)
BLOCK_BYTES, EXPONENT_BIAS = 16, 127


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MXFP4Tensor(QuantizedTensor):
    """The matrices of all experts of a layer.

    Attributes:
        blocks: uint8 ``(experts, out, blocks of in, 16)``.
        scales: uint8 ``(experts, out, blocks of in)``.
    """

    blocks: Array
    scales: Array

    def dequantize(self) -> Array:
        """The matrices as ``(experts, in, out)``, as transformers' parameter has them."""

        def make(experts: slice) -> Array:
            values = E2M1[unpack(self.blocks[experts], 4)]
            exponents = self.scales[experts].astype(np.int32) - EXPONENT_BIAS
            return np.ldexp(values, exponents[..., None])

        shape = (*self.scales.shape, 2 * BLOCK_BYTES)
        floats = by_rows(shape, self.dtype, make)
        return floats.reshape(*shape[:2], -1).swapaxes(1, 2)


def read_mxfp4(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the experts in MXFP4.

    Raises:
        ValueError: A tensor is missing or does not fit the others.
    """
    for name in stored.modules("_blocks"):
        blocks = stored.take(f"{name}_blocks", [UINT8])
        if blocks.ndim != 4 or blocks.shape[-1] != BLOCK_BYTES:
            raise damaged(f"{name}_blocks", f"has shape {blocks.shape}, not (experts, out, blocks, {BLOCK_BYTES})")
        scales = stored.take(f"{name}_scales", [UINT8], blocks.shape[:-1])
        experts, outputs, count, size = blocks.shape
        shape = (experts, count * size * 2, outputs)
        yield MXFP4Tensor(key=name, shape=shape, dtype=BFLOAT16, blocks=blocks, scales=scales)
