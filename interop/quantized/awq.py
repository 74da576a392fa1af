"""AWQ (https://arxiv.org/abs/2306.00978) in AutoAWQ's layout "gemm".

``weight[out, in] = (qweight[in, out] - qzeros[g, out]) * scales[g, out]`` with ``g = in // group_size``. Both kinds of
integers are packed along their outputs, eight to a word of 32 bits, in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, integer_codes, integer_form
from peft_jax.interop.quantized.base import (
    FLOATS,
    INT32,
    Array,
    QuantizedTensor,
    Settings,
    StoredTensors,
    by_rows,
    damaged,
    number,
    refused,
)

BITS, PER_WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word holds its first, second, ... output


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AWQTensor(QuantizedTensor):
    """A weight of AWQ.

    Attributes:
        qweight: int32 ``(in, out / 8)``.
        qzeros: int32 ``(groups, out / 8)``.
        scales: ``(groups, out)``, in ``dtype``.
        group_size: Inputs of a group.
    """

    qweight: Array
    qzeros: Array
    scales: Array
    group_size: int

    def dequantize(self) -> Array:
        """Integers less the zero points of their groups, times the scales."""
        groups = np.arange(self.shape[1]) // self.group_size
        zeros, scales = _unpack(self.qzeros), self.scales.astype(np.float32)

        def make(inputs: slice) -> Array:
            part = _unpack(self.qweight[inputs]) - zeros[groups[inputs]]
            return part * scales[groups[inputs]]  # a product of two 16-bit floats is exact in float32

        return by_rows(self.shape[::-1], self.dtype, make).T

    def signed_zeros(self) -> Array:
        """Zero points around 0, ``(groups, out)``."""
        return _unpack(self.qzeros).astype(np.int16) - 2 ** (BITS - 1)

    def form(self) -> Form | None:
        """Integers by groups."""
        return integer_form(BITS, self.group_size, self.dtype, self.signed_zeros())

    def codes(self) -> Codes:
        """Integers and zero points around 0."""
        form = self.form()
        if form is None:
            return super().codes()
        signed = _unpack(self.qweight).astype(np.int16) - 2 ** (BITS - 1)
        return integer_codes(form, signed, self.scales, self.signed_zeros())


def _unpack(words: Array) -> Array:
    """Unsigned integers ``(rows, out)`` in float32 from words ``(rows, out / 8)``."""
    words = words.view(np.uint32)
    fields = np.empty((*words.shape, PER_WORD), np.float32)
    for output, place in enumerate(PLACES):
        fields[..., output] = (words >> np.uint32(place * BITS)) & np.uint32(2**BITS - 1)
    return fields.reshape(len(words), -1)


def read_awq(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights of AWQ.

    Raises:
        ValueError: The layout is not read, or a tensor is missing or does not fit the others.
    """
    layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if layout != "gemm":
        raise refused(settings, "version", layout, ["gemm"])
    if (bits := number(settings, "bits", BITS)) != BITS:
        raise refused(settings, "bits", bits, [BITS])
    group_size = number(settings, "group_size", 128)
    for module in stored.modules(".qweight"):
        yield _read(module, stored, group_size)


def _read(module: str, stored: StoredTensors, group_size: int) -> AWQTensor:
    qweight = stored.take(f"{module}.qweight", [INT32])
    if qweight.ndim != 2:
        raise damaged(f"{module}.qweight", f"has shape {qweight.shape}, and is no matrix")
    inputs, words = qweight.shape
    size = inputs if group_size == -1 else group_size
    if size < 1 or inputs % size:
        advice = "Correct group_size in config.json, or take an undamaged copy of the checkpoint."
        raise damaged(
            f"{module}.qweight", f"has {inputs} inputs, which group_size={group_size} does not divide", advice
        )
    qzeros = stored.take(f"{module}.qzeros", [INT32], (inputs // size, words))
    scales = stored.take(f"{module}.scales", FLOATS, (inputs // size, words * PER_WORD))
    return AWQTensor(
        key=f"{module}.weight",
        shape=(words * PER_WORD, inputs),
        dtype=scales.dtype,
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        group_size=size,
    )
