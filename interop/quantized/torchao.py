"""torchao's weights in safetensors: the parts of a tensor subclass, which the header of the file describes.

``Int8Tensor`` and ``IntxUnpackedToInt8Tensor``: ``(qdata - zero_point) * scale`` by blocks. ``Int4Tensor``: two signed
integers a byte, the first in the low half, ``qdata * scale + zero_point`` by groups of inputs, where scales and zero
points are ``(groups, out)``. Layouts for the kernels of one device, as ``Int4TilePackedTo4dTensor``, are not read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, by_output, integer_codes, integer_form
from peft_jax.interop.quantized.base import (
    COPY,
    FLOATS,
    INT8,
    INT32,
    INT64,
    UINT8,
    Array,
    Blocks,
    QuantizedTensor,
    Settings,
    StoredTensors,
    by_rows,
    damaged,
    refused,
    scaled_by_rows,
    unpack,
)

from peft_jax.core.strict_json import parse_json

PLAIN = "Tensor"
BYTES, NIBBLES = ("Int8Tensor", "IntxUnpackedToInt8Tensor"), "Int4Tensor"
DTYPES = {str(dtype): dtype for dtype in FLOATS}
ZEROS = (INT8, INT32, INT64)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TorchaoInt8(QuantizedTensor):
    """A weight of torchao with an integer a byte.

    Attributes:
        qdata: int8 ``(out, in)``.
        scale: ``(blocks of out, blocks of in)``.
        zero_point: In the shape of ``scale``; None for zeros.
        block: Elements that have a scale in common, along both axes.
    """

    qdata: Array
    scale: Array
    zero_point: Array | None
    block: tuple[int, int]

    def dequantize(self) -> Array:
        """Integers less their zero points, times their scales."""
        scales = Blocks.of(self.scale, self.shape, self.block)
        zeros = None if self.zero_point is None else Blocks.of(self.zero_point, self.shape, self.block)
        return scaled_by_rows(self, lambda rows: self.qdata[rows], scales, zeros)

    def form(self) -> Form | None:
        """Integers of 8 bits by groups."""
        return integer_form(8, self.block[1], self.dtype, self.zero_point)

    def codes(self) -> Codes:
        """Integers and zero points."""
        form, zeros = self.form(), self.zero_point
        if form is None:
            return super().codes()
        zeros = None if zeros is None else by_output(zeros, self.shape, self.block)
        return integer_codes(form, self.qdata.T, by_output(self.scale, self.shape, self.block), zeros)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TorchaoInt4(QuantizedTensor):
    """A weight of torchao with two integers a byte.

    Attributes:
        qdata: int8 ``(out, in / 2)``.
        scale: ``(groups, out)``, in ``dtype``.
        zero_point: ``(groups, out)``: what is added after scaling.
        group_size: Inputs of a group.
    """

    qdata: Array
    scale: Array
    zero_point: Array
    group_size: int

    def dequantize(self) -> Array:
        """Integers times the scales of their groups and plus their zero points, in float32, rounded once."""
        block = (1, self.group_size)
        scales = Blocks.of(self.scale.T, self.shape, block)
        zeros = Blocks.of(self.zero_point.T, self.shape, block)

        def make(rows: slice) -> Array:
            fields = unpack(self.qdata[rows], 4).astype(np.int8)
            signed = (fields ^ np.int8(8)) - np.int8(8)
            return signed * scales.at(rows) + zeros.at(rows)

        return by_rows(self.shape, self.dtype, make)


def read_torchao(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights that the files' headers describe.

    Raises:
        ValueError: There is no description, a layout is not read, or a tensor is missing or does not fit the others.
    """
    described = {name: _description(name, stored.metadata) for name in _names(stored.metadata)}
    for key, about in described.items():
        kind = about.get("_type")
        if kind == PLAIN:
            continue
        if kind not in (*BYTES, NIBBLES):
            raise refused(settings, f"the layout of '{key}'", kind, (*BYTES, NIBBLES))
        module, _, name = key.rpartition(".")
        prefix = f"{module}._{name}_"
        if f"{prefix}act_pre_scale" in stored.left:
            raise damaged(f"{prefix}act_pre_scale", "scales activations, which is not supported", "Save it without.")
        read = _read_nibbles if kind == NIBBLES else _read_bytes
        yield read(key, prefix, about["_data"], stored)
        stored.drop_activations([f"_{name}_act_quant_scale", f"_{name}_act_quant_zero_point"])
        if about["_data"].get("act_quant_kwargs") or about["_data"].get("activation_quantization"):
            stored.quantizes_activations = True


def _names(metadata: Mapping[str, str]) -> list[str]:
    try:
        names = parse_json(metadata["tensor_names"])
    except (KeyError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "The checkpoint's safetensors have no description of torchao's tensors in their headers (tensor_names). "
            "Save it with torchao 0.15 or newer and safe_serialization=True."
        )
    return names


def _description(key: str, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        about = parse_json(metadata[key])
        kind, data = about["_type"], about.get("_data", {})
    except (KeyError, ValueError, TypeError, AttributeError):
        data = None
    if not isinstance(data, Mapping):
        raise damaged(key, "is not described in the header of its file")
    return {"_type": kind, "_data": data}


def _block(key: str, data: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    block = data.get("block_size")
    if not isinstance(block, list) or len(block) != 2 or len(shape) != 2 or not all(block):
        raise damaged(key, f"has block_size={block!r} and shape {shape}; matrices alone are read")
    if shape[0] % block[0] or shape[1] % block[1]:
        raise damaged(key, f"has shape {shape}, which its block_size={block} does not divide")
    return block[0], block[1]


def _read_bytes(key: str, prefix: str, data: Mapping[str, Any], stored: StoredTensors) -> TorchaoInt8:
    qdata = stored.take(f"{prefix}qdata", [INT8])
    block = _block(f"{prefix}qdata", data, qdata.shape)
    grid = (qdata.shape[0] // block[0], qdata.shape[1] // block[1])
    scale = stored.take(f"{prefix}scale", FLOATS)
    zero_point = stored.take_if_there(f"{prefix}zero_point", ZEROS)
    for name, found in (("scale", scale), ("zero_point", zero_point)):
        if found is not None and found.size != grid[0] * grid[1]:
            raise damaged(f"{prefix}{name}", f"has shape {found.shape}, and there are {grid} blocks of {block}")
    said = data.get("dtype") or {}
    dtype = DTYPES.get(str(said.get("_data")))
    if dtype is None:
        raise damaged(key, f"has dtype={data.get('dtype')!r} in the header of its file", COPY)
    zero_point = None if zero_point is None else zero_point.reshape(grid)
    return TorchaoInt8(
        key=key,
        shape=qdata.shape,
        dtype=dtype,
        qdata=qdata,
        scale=scale.reshape(grid),
        zero_point=zero_point,
        block=block,
    )


def _read_nibbles(key: str, prefix: str, data: Mapping[str, Any], stored: StoredTensors) -> TorchaoInt4:
    qdata = stored.take(f"{prefix}qdata", [INT8, UINT8])
    shape = (qdata.shape[0], qdata.shape[-1] * 2)
    height, size = _block(f"{prefix}qdata", data, shape)
    if height != 1 or qdata.ndim != 2:
        raise damaged(f"{prefix}qdata", f"has blocks of {(height, size)} in {qdata.shape}; groups of inputs are read")
    groups = (shape[1] // size, shape[0])
    scale = stored.take(f"{prefix}scale", FLOATS, groups)
    zero_point = stored.take(f"{prefix}zero_point", FLOATS, groups)
    return TorchaoInt4(
        key=key, shape=shape, dtype=scale.dtype, qdata=qdata, scale=scale, zero_point=zero_point, group_size=size
    )
