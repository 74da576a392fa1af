"""compressed-tensors: integers of 1 to 8 bits packed into words, int8, and fp8, with scales by tensor to block.

``weight = (integer - zero point) * scale`` in the scale's element type. Packed fields are unsigned, ``2**(bits - 1)``
more than the integers; weights are packed along their inputs, zero points along their outputs.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, by_output, integer_codes, integer_form, regular_groups
from peft_jax.interop.quantized.base import (
    COPY,
    FLOATS,
    INT8,
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
from peft_jax.interop.quantized.fp8 import FP8

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
SPARSITY = ("dense",)
TYPES = {"int": (INT8,), "float": FP8}
ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CompressedTensor(QuantizedTensor):
    """A weight of compressed-tensors.

    Attributes:
        values: int8 or fp8 ``(out, in)``, or int32 ``(out, words)`` if packed.
        scale: ``(blocks of out, blocks of in)``, in ``dtype``.
        zero_point: int8 in the shape of ``scale``, or int32 ``(words, blocks of in)`` if packed; None for zeros.
        block: Elements that have a scale in common, along both axes.
        bits: Bits of a packed integer; 0 for what is not packed.
        g_idx: int32 ``(in,)``: the block of each input, where they are not in order.
    """

    values: Array
    scale: Array
    zero_point: Array | None
    block: tuple[int, int]
    bits: int = 0
    g_idx: Array | None = None

    def signed(self, rows: slice) -> Array:
        """Integers or floats of some outputs, ``(rows, in)``, before the zero points are subtracted."""
        if not self.bits:
            return self.values[rows]
        return unpack(self.values[rows], self.bits)[:, : self.shape[1]].astype(np.int16) - 2 ** (self.bits - 1)

    def zeros(self) -> Array | None:
        """Zero points in the shape of ``scale``."""
        if self.zero_point is None or self.zero_point.dtype != INT32:
            return self.zero_point
        fields = unpack(self.zero_point.T, self.bits)[:, : self.scale.shape[0]].T
        return fields.astype(np.int16) - 2 ** (self.bits - 1)

    def dequantize(self) -> Array:
        """Values less their zero points, times their scales."""
        zero_points = self.zeros()
        scales = Blocks.of(self.scale, self.shape, self.block, self.g_idx)
        zeros = None if zero_points is None else Blocks.of(zero_points, self.shape, self.block, self.g_idx)
        return scaled_by_rows(self, self.signed, scales, zeros)

    def form(self) -> Form | None:
        """Integers by groups, if the inputs of a group follow one another; fp8 has no weight of its own."""
        if self.values.dtype not in (INT8, INT32):
            return None
        if self.g_idx is not None and regular_groups(self.g_idx, self.block[1]) is None:
            return None
        return integer_form(self.bits or 8, self.block[1], self.dtype, self.zeros())

    def codes(self) -> Codes:
        """Integers and zero points around 0."""
        form, zeros = self.form(), self.zeros()
        if form is None:
            return super().codes()
        groups = None if self.g_idx is None else regular_groups(self.g_idx, self.block[1])
        scale = by_output(self.scale, self.shape, self.block, groups)
        zeros = None if zeros is None else by_output(zeros, self.shape, self.block, groups)
        return integer_codes(form, self.signed(slice(None)).T, scale, zeros)


def read_compressed_tensors(settings: Settings, stored: StoredTensors) -> Iterator[QuantizedTensor]:
    """Take the weights of all groups of the config.

    Raises:
        ValueError: A format is not read, or a tensor is missing or does not fit the others.
    """
    sparsity = (settings.get("sparsity_config") or {}).get("format", SPARSITY[0])
    if sparsity not in SPARSITY:
        raise refused(settings, "sparsity_config.format", sparsity, SPARSITY)
    if transforms := (settings.get("transform_config") or {}).get("config_groups"):
        raise refused(settings, "transform_config", transforms, [None])
    groups = list((settings.get("config_groups") or {}).values())
    modules = dict.fromkeys([*stored.modules(".weight_packed"), *stored.modules(".weight_scale")])
    for module in modules:
        group = _group_of(module, groups)
        layout = group.get("format") or settings.get("format")
        if layout not in FORMATS:
            raise refused(settings, "format", layout, FORMATS)
        yield _read(module, stored, settings, group.get("weights") or {}, layout == PACKED)
    stored.quantizes_activations = any(group.get("input_activations") for group in groups)
    stored.drop_activations(ACTIVATIONS)


def _group_of(module: str, groups: list[Any]) -> Mapping[str, Any]:
    """The group whose target is the module's name or a regex of it, or else the first that targets classes."""
    for group in groups:
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target == module or (pattern != target and re.match(pattern, module)):
                return dict(group)
    for group in groups:
        if any(target.isidentifier() for target in group["targets"]):
            return dict(group)
    raise ValueError(f"No config_groups of the quantization_config target the checkpoint's module '{module}'. {COPY}")


def _read(
    module: str, stored: StoredTensors, settings: Settings, weights: Settings, is_packed: bool
) -> CompressedTensor:
    bits, kind = number(weights, "num_bits", 8), weights.get("type", "int")
    if kind not in TYPES or not 1 <= bits <= 8 or (bits != 8 and not is_packed):
        raise refused(settings, "weights", f"{kind}{bits}", ["int1 to int8 pack-quantized", "int8", "float8"])
    scale = stored.take(f"{module}.weight_scale", FLOATS)
    if is_packed:
        values = stored.take(f"{module}.weight_packed", [INT32])
        shape = _shape(f"{module}.weight_shape", stored)
        words = (shape[0], -(-shape[1] * bits // 32))
        if values.shape != words:
            why = f"has shape {values.shape}, not {words} as num_bits={bits} and weight_shape {shape} have it"
            raise damaged(f"{module}.weight_packed", why)
    else:
        values = stored.take(f"{module}.weight", TYPES[kind])
        shape = values.shape
    if len(shape) != 2:
        raise damaged(f"{module}.weight", f"has shape {shape}, and is no matrix")
    grid, block = _blocks(module, weights, (shape[0], shape[1]))
    if scale.shape not in (grid, grid[:1] if grid[1] == 1 else grid):
        raise damaged(f"{module}.weight_scale", f"has shape {scale.shape}, not {grid} as blocks of {block} have it")
    zero_point = stored.take_if_there(f"{module}.weight_zero_point", [INT32, INT8, *FLOATS, *FP8])
    if zero_point is None and not weights.get("symmetric", True):
        raise damaged(f"{module}.weight_zero_point", "is missing, and the weights are not symmetric")
    if zero_point is not None:
        is_words = zero_point.dtype == INT32
        wanted = (-(-grid[0] * bits // 32), grid[1]) if is_words else scale.shape
        if zero_point.shape != wanted:
            raise damaged(f"{module}.weight_zero_point", f"has shape {zero_point.shape}, not {wanted}")
        zero_point = zero_point.reshape(wanted if is_words else grid)
    return CompressedTensor(
        key=f"{module}.weight",
        shape=shape,
        dtype=scale.dtype,
        values=values,
        scale=scale.reshape(grid),
        zero_point=zero_point,
        block=block,
        bits=bits if is_packed else 0,
        g_idx=_g_idx(f"{module}.weight_g_idx", stored, shape[1], grid[1]),
    )


def _shape(key: str, stored: StoredTensors) -> tuple[int, ...]:
    shape = stored.take(key, [INT64, INT32], (2,))
    return tuple(int(size) for size in shape)


def _blocks(module: str, weights: Settings, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many blocks have a scale of their own, and how large they are."""
    size = weights.get("group_size")
    otherwise = {None: "tensor", -1: "channel"}.get(size, "group")
    strategy = weights.get("strategy") or otherwise
    blocks = {
        "tensor": shape,
        "channel": (1, shape[1]),
        "group": (1, size),
        "block": tuple(weights.get("block_structure") or ()),
    }
    if strategy not in blocks:
        raise refused({"quant_method": "compressed-tensors"}, "strategy", strategy, blocks)
    block = blocks[strategy]
    if len(block) != 2 or not all(isinstance(one, int) and one > 0 for one in block):
        raise damaged(f"{module}.weight_scale", f"has strategy={strategy!r} with a block of {block}, which is none")
    if strategy == "group" and shape[1] % block[1]:
        advice = "Correct group_size in config.json, or take an undamaged copy of the checkpoint."
        raise damaged(
            f"{module}.weight_scale", f"has {shape[1]} inputs, which group_size={size} does not divide", advice
        )
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1])), (block[0], block[1])


def _g_idx(key: str, stored: StoredTensors, inputs: int, groups: int) -> Array | None:
    """The group of each input; None if they are in order, which a file may write as -1."""
    g_idx = stored.take_if_there(key, [INT32, INT64], (inputs,))
    if g_idx is None or (g_idx == -1).all():
        return None
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise damaged(key, f"names groups {g_idx.min()} to {g_idx.max()}, and there are {groups}")
    return g_idx
