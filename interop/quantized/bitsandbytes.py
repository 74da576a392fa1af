"""bitsandbytes' 4-bit and 8-bit weights, as transformers saves them.

4 bits: two elements a byte, the first in the high half, row by row; a table of 16 values (``nf4`` of
https://arxiv.org/abs/2305.14314, or ``fp4``) times the largest magnitude of each block. These magnitudes may be in
8 bits themselves, by a table of 256 values and blocks of their own, less their mean.
8 bits: integers times the largest magnitude of their row, over 127.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from peft_jax.interop.packed_codes import INT8 as INTEGERS
from peft_jax.interop.packed_codes import Codes, Form
from peft_jax.interop.quantized.base import (
    COPY,
    FLOAT32,
    FLOATS,
    INT8,
    UINT8,
    Array,
    QuantizedTensor,
    Settings,
    StoredTensors,
    by_rows,
    damaged,
)

from peft_jax.core.strict_json import parse_json
from peft_jax.quant.double_scale import BLOCK as NESTED_BLOCK
from peft_jax.quant.double_scale import VALUES as NESTED_VALUES
from peft_jax.quant.nf4 import VALUES

# bitsandbytes' kernels have these tables built in; old files have other roundings of the second.
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLES = {
    "nf4": np.array(VALUES, np.float32),
    "fp4": np.array([*FP4_MAGNITUDES, *(-one for one in FP4_MAGNITUDES)], np.float32) / np.float32(12),
}
DTYPES = {str(dtype): dtype for dtype in FLOATS}
STATE = ".weight.quant_state.bitsandbytes__"
STEP_OF_127 = np.float32(7.874015718698502e-3)  # bitsandbytes' 1 / 127


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bnb4bit(QuantizedTensor):
    """A weight of bitsandbytes in 4 bits.

    Attributes:
        packed: uint8, two elements a byte.
        absmax: The largest magnitude of each block: float32, or uint8 if it is quantized itself.
        quant_type: "nf4" or "fp4".
        blocksize: Elements of a block.
        nested_absmax: float32 ``(absmax blocks,)``, if ``absmax`` is quantized.
        nested_table: float32 ``(256,)``: the values of ``absmax``'s integers.
        nested_blocksize: Elements of a block of ``absmax``.
        nested_offset: What is added to each of them.
    """

    packed: Array
    absmax: Array
    quant_type: str
    blocksize: int
    nested_absmax: Array | None = None
    nested_table: Array | None = None
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    def largest(self) -> Array:
        """The largest magnitude of each block in float32, dequantized if need be."""
        if self.nested_absmax is None or self.nested_table is None:
            return self.absmax
        values = self.nested_table[self.absmax]
        steps = np.repeat(self.nested_absmax, self.nested_blocksize)[: len(values)]
        return values * steps + np.float32(self.nested_offset)

    def dequantize(self) -> Array:
        """The values of the table times the largest magnitude of their block."""
        largest, table = self.largest(), TABLES[self.quant_type]
        whole = np.pad(self.packed, (0, -self.packed.size % (self.blocksize // 2)))  # the last block may be short
        octets = whole.reshape(len(largest), self.blocksize // 2)

        def make(blocks: slice) -> Array:
            pairs = np.stack((octets[blocks] >> 4, octets[blocks] & 15), axis=-1)
            values = table[pairs].reshape(len(pairs), self.blocksize)
            values *= largest[blocks, None]
            return values

        array = by_rows((len(largest), self.blocksize), self.dtype, make)
        return array.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)

    def form(self) -> Form | None:
        """NF4 or FP4; scales in 8 bits are kept if their table and blocks are those of bitsandbytes today."""
        if len(self.shape) != 2:
            return None
        form = Form(self.quant_type, self.blocksize, self.dtype)
        if self.nested_table is None:
            return form
        fits = self.nested_blocksize == NESTED_BLOCK and np.array_equal(self.nested_table, NESTED_VALUES)
        return form._replace(is_nested=True) if fits else None

    def codes(self) -> Codes:
        """The elements in halves of bytes, and the largest magnitudes by blocks of each output."""
        pairs = np.stack((self.packed >> 4, self.packed & 15), axis=-1)
        numbers = pairs.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)
        scale = self.absmax
        if self.shape[1] % self.blocksize == 0:
            scale = np.ascontiguousarray(scale.reshape(self.shape[0], -1).T)
        if self.nested_absmax is None:
            return Codes(numbers.T, scale)
        return Codes(numbers.T, scale, largest=self.nested_absmax, offset=np.asarray(self.nested_offset, np.float32))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bnb8bit(QuantizedTensor):
    """A weight of bitsandbytes in 8 bits.

    Attributes:
        integers: int8 ``(out, in)``.
        largest: float32 ``(out,)``: the magnitude that 127 stands for.
    """

    integers: Array
    largest: Array

    def dequantize(self) -> Array:
        """The integers times their row's largest magnitude over 127, in bitsandbytes' order."""

        def make(rows: slice) -> Array:
            return self.integers[rows].astype(np.float32) * self.largest[rows, None] * STEP_OF_127

        return by_rows(self.shape, self.dtype, make)

    def form(self) -> Form:
        """Int8 per output, whose scales are counted in 127ths."""
        return Form(INTEGERS, None, self.dtype, unit=float(STEP_OF_127))

    def codes(self) -> Codes:
        """The integers, and the largest magnitudes as scales."""
        return Codes(self.integers.T, self.largest)


def read_bitsandbytes(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights of either kind.

    Raises:
        ValueError: A tensor is missing or does not fit the others.
    """
    for key in [key for key in stored.left if STATE in key]:
        yield _read_4bit(key, stored)
    for module in stored.modules(".SCB"):
        stored.quantizes_activations = True
        yield _read_8bit(module, stored)


def _read_4bit(state_key: str, stored: StoredTensors) -> Bnb4bit:
    weight = state_key.partition(STATE)[0] + ".weight"
    state = _read_state(state_key, stored.take(state_key, [UINT8]))
    quant_type, blocksize, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
    packed = stored.take(weight, [UINT8, INT8, *FLOATS]).reshape(-1).view(np.uint8)
    count = math.prod(shape)
    if packed.size != -(-count // 2):
        raise damaged(weight, f"has {packed.size} bytes, which are not two elements each of the shape {shape}")
    table = stored.take_if_there(f"{weight}.quant_map", [FLOAT32], (16,))
    if table is not None and not np.allclose(table, TABLES[quant_type], atol=1e-3):
        raise damaged(f"{weight}.quant_map", f"is not the table of {quant_type}")
    blocks = -(-count // blocksize)
    nested: dict[str, Any] = {}
    if "nested_blocksize" in state:
        size = state["nested_blocksize"]
        nested["nested_absmax"] = stored.take(f"{weight}.nested_absmax", [FLOAT32], (-(-blocks // size),))
        nested["nested_table"] = stored.take(f"{weight}.nested_quant_map", [FLOAT32], (256,))
        nested |= {"nested_blocksize": size, "nested_offset": state["nested_offset"]}
    absmax = stored.take(f"{weight}.absmax", [UINT8] if nested else [FLOAT32], (blocks,))
    return Bnb4bit(
        key=weight,
        shape=shape,
        dtype=DTYPES[state["dtype"]],
        packed=packed,
        absmax=absmax,
        quant_type=quant_type,
        blocksize=blocksize,
        **nested,
    )


def _read_state(key: str, octets: Array) -> dict[str, Any]:
    """The JSON object that a quant_state tensor holds, with the fields that are needed here."""
    try:
        state = parse_json(octets.tobytes().decode())
        sizes = [state["blocksize"], *state["shape"]]
        if "nested_offset" in state:
            sizes.append(state["nested_blocksize"])
            state["nested_offset"] = float(state["nested_offset"])
        known = state["quant_type"] in TABLES and state["dtype"] in DTYPES
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(key, f"is no quant_state of bitsandbytes ({type(error).__name__}: {error})") from None
    if not known or not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[0] % 2:
        fields = ", ".join(f"{name}={state[name]!r}" for name in ("quant_type", "dtype", "blocksize", "shape"))
        kinds = f"quant_type is one of {', '.join(TABLES)}, dtype one of {', '.join(DTYPES)}"
        raise damaged(key, f"has {fields}; {kinds}, sizes are positive, and blocks even", COPY)
    return dict(state)


def _read_8bit(module: str, stored: StoredTensors) -> Bnb8bit:
    weight = f"{module}.weight"
    integers = stored.take(weight, [INT8])
    if integers.ndim != 2:
        raise damaged(weight, f"has shape {integers.shape}, and is no matrix")
    largest = stored.take(f"{module}.SCB", [FLOAT32], integers.shape[:1])
    layout = stored.take_if_there(f"{module}.weight_format", [UINT8])
    if layout is not None and np.any(layout):
        advice = "Save the checkpoint with bitsandbytes 0.45 or newer, which writes rows."
        raise damaged(f"{module}.weight_format", f"is {layout.tolist()}: 0, row by row, alone is read", advice)
    return Bnb8bit(key=weight, shape=integers.shape, dtype=FLOAT32, integers=integers, largest=largest)
