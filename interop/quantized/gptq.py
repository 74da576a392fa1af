"""GPTQ (https://arxiv.org/abs/2210.17323) in the layout of AutoGPTQ and GPTQModel.

``weight[out, in] = scales[g, out] * (qweight[in, out] - zeros[g, out])`` with ``g = g_idx[in]``. Integers are packed
into words of 32 bits: ``qweight`` along its inputs, ``qzeros`` along its outputs. The formats "gptq" (v1) and
"gptq_v2" differ in the zero points: v1 stores one less. GPTQModel subtracts and adds that one word by word, so that a
borrow crosses fields of 2, 4 and 8 bits; fields of 3 bits wrap around each for itself.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, integer_codes, integer_form, regular_groups
from peft_jax.interop.quantized.base import (
    FLOATS,
    INT32,
    INT64,
    Array,
    Blocks,
    QuantizedTensor,
    Settings,
    StoredTensors,
    damaged,
    number,
    refused,
    scaled_by_rows,
    unpack,
)

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GPTQTensor(QuantizedTensor):
    """A weight of GPTQ.

    Attributes:
        qweight: int32 ``(in * bits / 32, out)``.
        qzeros: int32 ``(groups, out * bits / 32)``.
        scales: ``(groups, out)``, in ``dtype``.
        g_idx: int32 ``(in,)``: the group of each input.
        group_size: Inputs of a group.
        bits: 2, 3, 4 or 8.
        is_v1: Whether ``qzeros`` holds the zero points less one.
    """

    qweight: Array
    qzeros: Array
    scales: Array
    g_idx: Array
    group_size: int
    bits: int
    is_v1: bool

    def integers(self, rows: slice) -> Array:
        """Unsigned integers of some outputs, ``(rows, in)``."""
        return unpack(self.qweight[:, rows].T, self.bits)

    def zeros(self) -> Array:
        """Unsigned zero points ``(groups, out)``."""
        if not self.is_v1:
            return unpack(self.qzeros, self.bits)
        if self.bits == 3:
            return (unpack(self.qzeros, self.bits) + np.uint8(1)) & np.uint8(7)
        ones = np.uint32((2**32 - 1) // (2**self.bits - 1))  # 1 in each field
        return unpack(self.qzeros.view(np.uint32) + ones, self.bits)

    def dequantize(self) -> Array:
        """Integers less the zero points of their groups, times the scales."""
        by_output = (1, self.shape[1])
        scales = Blocks.of(self.scales.T, self.shape, by_output, self.g_idx)
        zeros = Blocks.of(self.zeros().T, self.shape, by_output, self.g_idx)
        return scaled_by_rows(self, self.integers, scales, zeros)

    def signed_zeros(self) -> Array:
        """Zero points around 0, ``(groups, out)``."""
        return self.zeros().astype(np.int16) - 2 ** (self.bits - 1)

    def form(self) -> Form | None:
        """Integers by groups, if the inputs of a group follow one another."""
        if regular_groups(self.g_idx, self.group_size) is None:
            return None
        return integer_form(self.bits, self.group_size, self.dtype, self.signed_zeros())

    def codes(self) -> Codes:
        """Integers and zero points around 0."""
        form, groups = self.form(), regular_groups(self.g_idx, self.group_size)
        if form is None or groups is None:
            return super().codes()
        fields = self.integers(slice(None)).T
        signed = fields.astype(np.int16) - 2 ** (self.bits - 1)
        return integer_codes(form, signed, self.scales[groups], self.signed_zeros()[groups])


def read_gptq(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights of GPTQ.

    Raises:
        ValueError: The format is not read, or a tensor is missing or does not fit the others.
    """
    layout = settings.get("checkpoint_format") or settings.get("format") or FORMATS[0]
    if layout not in FORMATS:
        raise refused(settings, "checkpoint_format", layout, FORMATS)
    for module in stored.modules(".qweight"):
        own = {**settings, **_overrides(settings, module)}
        bits = number(own, "bits")
        if bits not in BITS:
            raise refused(settings, "bits", bits, BITS)
        yield _read(module, stored, bits, number(own, "group_size", 128), layout == FORMATS[0])


def _overrides(settings: Settings, module: str) -> Mapping[str, Any]:
    """The fields that GPTQModel's ``dynamic`` has for a module; the first regex that matches decides."""
    for pattern, fields in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), module):
            return fields if isinstance(fields, Mapping) else {}
    return {}


def _read(module: str, stored: StoredTensors, bits: int, group_size: int, is_v1: bool) -> GPTQTensor:
    qweight = stored.take(f"{module}.qweight", [INT32])
    scales = stored.take(f"{module}.scales", FLOATS)
    if qweight.ndim != 2 or scales.ndim != 2 or qweight.shape[1] != scales.shape[1]:
        raise damaged(
            f"{module}.scales", f"has shape {scales.shape}, which does not fit {qweight.shape} of the integers"
        )
    (words, outputs), groups = qweight.shape, scales.shape[0]
    inputs, zero_words = words * 32 // bits, outputs * bits // 32
    with_bits = f"with bits={bits} of quantization_config"
    advice = "Correct bits and group_size in config.json, or take an undamaged copy of the checkpoint."
    if words * 32 % bits or outputs * bits % 32:
        raise damaged(f"{module}.qweight", f"has shape {qweight.shape}, which {with_bits} holds no whole words", advice)
    qzeros = stored.take(f"{module}.qzeros", [INT32])
    if qzeros.shape != (groups, zero_words):
        raise damaged(
            f"{module}.qzeros", f"has shape {qzeros.shape}, not {(groups, zero_words)} as {with_bits} it should", advice
        )
    size = inputs if group_size == -1 else group_size
    if size < 1 or groups != -(-inputs // size):
        raise damaged(
            f"{module}.scales",
            f"has {groups} groups, and {with_bits} and group_size={group_size} there are {inputs} inputs",
            advice,
        )
    g_idx = stored.take_if_there(f"{module}.g_idx", [INT32, INT64])
    if g_idx is None:
        g_idx = np.arange(inputs, dtype=np.int32) // size
    if g_idx.shape != (inputs,):
        raise damaged(f"{module}.g_idx", f"has shape {g_idx.shape}, and {with_bits} there are {inputs} inputs", advice)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise damaged(f"{module}.g_idx", f"names groups {g_idx.min()} to {g_idx.max()}, and there are {groups}")
    return GPTQTensor(
        key=f"{module}.weight",
        shape=(outputs, inputs),
        dtype=scales.dtype,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
        group_size=size,
        bits=bits,
        is_v1=is_v1,
    )
