"""Quantized checkpoints made by the formats' own libraries, or by their public layouts written down here.

Each writer takes a module's name and its float weight (out, in), and gives the tensors that a file has for it, and the
weight that the format's own reader makes of them.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, torch.Tensor]


class Format(NamedTuple):
    """A way to write a checkpoint: its quantization_config, and what it makes of a weight."""

    settings: dict[str, Any]
    write: Callable[[str, torch.Tensor], Written]


def random_weight(out: int = 32, inputs: int = 64, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def bnb4(
    name: str, weight: torch.Tensor, *, dtype: torch.dtype, storage: torch.dtype = torch.uint8, **options: Any
) -> Written:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight.to(dtype), quant_storage=storage, **options)
    parts = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {f"{name}.weight": packed, **parts}, bnb.dequantize_4bit(packed, state)


def bnb8(name: str, weight: torch.Tensor) -> Written:
    import bitsandbytes.functional as bnb

    integers, largest, _ = bnb.int8_vectorwise_quant(weight.half())
    parts = {
        f"{name}.weight": integers,
        f"{name}.SCB": largest,
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, bnb.int8_vectorwise_dequant(integers, largest)


def packed_in_words(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields of the last axis one after the other in one long integer for each row, cut into words of 32 bits."""
    words = fields.shape[-1] * bits // 32
    out = np.zeros((len(fields), words), np.uint32)
    for row, values in enumerate(fields.tolist()):
        whole = sum(value << (bits * place) for place, value in enumerate(values))
        out[row] = [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(words)]
    return out.view(np.int32)


def gptq(
    name: str,
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    v1: bool = True,
    act_order: bool = False,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    with_g_idx: bool = True,
) -> Written:
    """AutoGPTQ's and GPTQModel's layout: w = scales[g_idx] * (q - zeros[g_idx])."""
    out, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    groups, top = -(-inputs // size), 2**bits - 1
    rng = np.random.default_rng(bits)
    g_idx = np.arange(inputs, dtype=np.int32) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    zeros = np.full((groups, out), 2 ** (bits - 1)) if symmetric else rng.integers(1, top + 1, (groups, out))
    scales = (torch.rand(groups, out, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.01).to(dtype)
    q = np.round(weight.T.numpy() / scales.float().numpy()[g_idx]) + zeros[g_idx]
    q = q.clip(0, top).astype(np.int64)  # (in, out)
    stored_zeros = zeros - 1 if v1 else zeros
    parts = {
        f"{name}.qweight": torch.tensor(packed_in_words(q.T, bits).T.copy()),
        f"{name}.qzeros": torch.tensor(packed_in_words(stored_zeros, bits)),
        f"{name}.scales": scales,
    }
    if with_g_idx:
        parts[f"{name}.g_idx"] = torch.tensor(g_idx)
    places = torch.tensor(g_idx, dtype=torch.int64)
    return parts, (scales[places] * (torch.tensor(q) - torch.tensor(zeros)[places])).T.contiguous()


def awq(name: str, weight: torch.Tensor, *, group_size: int) -> Written:
    """AutoAWQ's WQLinear_GEMM: w = (q - zeros) * scales, eight outputs a word in the order of its order_map."""
    out, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    rng = np.random.default_rng(7)
    zeros = rng.integers(0, 16, (inputs // size, out))
    scales = torch.tensor(rng.uniform(0.01, 0.1, (inputs // size, out)), dtype=torch.float16)
    rows = np.arange(inputs) // size
    q = (np.round(weight.T.numpy() / scales.float().numpy()[rows]) + zeros[rows]).clip(0, 15).astype(np.int64)

    def pack(fields: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(fields), out // 8), np.uint32)
        for column in range(out // 8):
            for place, source in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= fields[:, column * 8 + source].astype(np.uint32) << np.uint32(4 * place)
        return torch.tensor(words.view(np.int32))

    parts = {f"{name}.qweight": pack(q), f"{name}.qzeros": pack(zeros), f"{name}.scales": scales}
    return parts, ((torch.tensor(q) - torch.tensor(zeros)[rows]) * scales[rows]).T.contiguous()


def compressed(name: str, weight: torch.Tensor, *, layout: str, dtype: torch.dtype, **options: Any) -> Written:
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    weight = weight.to(dtype)
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    blocks = weight.reshape(rows // height, height, columns // width, width)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    state = {"weight": weight, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(layout)
    small = compressor.compress(state, scheme)
    want = compressor.decompress(small, scheme)["weight"]
    return {f"{name}.{key}": value.contiguous() for key, value in small.items()}, want


def compressed_settings(layout: str, **options: Any) -> dict[str, Any]:
    weights = QuantizationArgs(**options).model_dump(mode="json")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        **{"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"},
        **{"config_groups": {"group_0": {**group, "format": layout}}, "ignore": ["lm_head"]},
    }


class Fp8Settings(NamedTuple):
    weight_block_size: list[int] | None
    scale_fmt: str = "float"


class Fp8Quantizer(NamedTuple):
    quantization_config: Fp8Settings


def fp8(name: str, weight: torch.Tensor, *, block: list[int] | None, scale_fmt: str = "float") -> Written:
    quantizer = Fp8Quantizer(Fp8Settings(block, scale_fmt))
    parts = Fp8Quantize(quantizer).convert({"weight": weight})
    wide = {**parts, "weight_scale_inv": parts["weight_scale_inv"].float()}
    want = Fp8Dequantize(quantizer).convert(wide)["weight"]
    return {f"{name}.{key.rpartition('.')[2]}": value for key, value in parts.items()}, want


def fbgemm(name: str, weight: torch.Tensor) -> Written:
    """FBGEMM's quantize_fp8_per_row: the largest of a row is 448, and the scale is what to multiply by."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{name}.weight": values, f"{name}.weight_scale": scale}, values.float() * scale


def mxfp4(name: str, weight: torch.Tensor) -> Written:
    """Random bits; weight gives the shape of each of two experts as (in, out)."""
    inputs, out = weight.shape
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, out, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, convert_moe_packed_tensors(blocks, scales)


def torchao_int8(name: str, weight: torch.Tensor) -> Written:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra test-torchao is not installed")
    Int8Tensor, PerRow = quantization.Int8Tensor, quantization.PerRow
    return _flat(name, Int8Tensor.from_hp(weight.bfloat16(), PerRow()))


def torchao_intx(name: str, weight: torch.Tensor, *, group_size: int) -> Written:
    quantization = pytest.importorskip("torchao.quantization", reason="the extra test-torchao is not installed")
    from torchao.quantization.quant_primitives import MappingType

    kind = {"mapping_type": MappingType.ASYMMETRIC}
    return _flat(name, quantization.IntxUnpackedToInt8Tensor.from_hp(weight, (1, group_size), torch.int4, **kind))


def _flat(name: str, tensor: Any) -> Written:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict({f"{name}.weight": tensor}), tensor.dequantize()


def torchao_int4(name: str, weight: torch.Tensor, *, group_size: int) -> Any:
    """The layout that torchao's Int4Tensor takes from FBGEMM's int4_row_quantize_zp and pack_int4."""
    out, inputs = weight.shape
    groups = weight.reshape(out, -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = (high - low).clamp(min=1e-6) / 15
    q = (((groups - low) / steps).round().clamp(0, 15) - 8).to(torch.int8).reshape(out, inputs)
    scale, zero = (one.squeeze(-1).T.contiguous().bfloat16() for one in (steps, low + 8 * steps))
    packed = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
    parts = {f"{name}._weight_qdata": packed, f"{name}._weight_scale": scale, f"{name}._weight_zero_point": zero}
    data = {"block_size": [1, group_size], "shape": [out, inputs]}
    about = {"_type": "Int4Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    places = torch.arange(inputs) // group_size
    want = (q.T * scale.float()[places] + zero.float()[places]).T.bfloat16()
    names = [f"{name}.weight"]
    return (parts, {names[0]: json.dumps(about), "tensor_names": json.dumps(names)}), want


def _formats() -> dict[str, Format]:
    formats: dict[str, Format] = {}
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind, double, dtype, size in [
        ("nf4", False, "bfloat16", 64),
        ("nf4", True, "float16", 64),
        ("nf4", True, "float32", 128),
        ("fp4", False, "float32", 64),
        ("fp4", True, "bfloat16", 64),
    ]:
        options = {"quant_type": kind, "compress_statistics": double, "blocksize": size}
        write = partial(bnb4, dtype=getattr(torch, dtype), **options)
        formats[f"bitsandbytes {kind}{' nested' * double} {dtype}"] = Format(nf4, write)
    write = partial(bnb4, dtype=torch.bfloat16, storage=torch.bfloat16, quant_type="nf4")
    formats["bitsandbytes nf4 stored as bfloat16"] = Format(nf4, write)
    formats["bitsandbytes int8"] = Format({"load_in_8bit": True}, bnb8)
    for bits, size, v1, act_order, symmetric in [
        (4, 16, True, False, True),
        (4, 16, True, True, False),
        (4, 32, False, True, False),
        (4, -1, False, False, False),
        (8, 16, True, True, False),
        (8, 32, False, False, True),
        (2, 16, True, True, False),
        (3, 32, True, True, False),
        (3, 16, False, False, True),
    ]:
        words = f"{'v1' if v1 else 'v2'}{' act-order' * act_order}{' symmetric' * symmetric}"
        settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": symmetric}
        settings |= {} if v1 else {"checkpoint_format": "gptq_v2"}
        write = partial(gptq, bits=bits, group_size=size, v1=v1, act_order=act_order, symmetric=symmetric)
        formats[f"gptq int{bits} by {size} {words}"] = Format(settings, write)
    bare = partial(gptq, bits=4, group_size=16, with_g_idx=False, dtype=torch.bfloat16)
    formats["gptq without g_idx, bfloat16"] = Format({"quant_method": "gptq", "bits": 4, "group_size": 16}, bare)
    for size in (16, -1):
        settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "GEMM", "zero_point": True}
        formats[f"awq by {size}"] = Format(settings, partial(awq, group_size=size))
    int4 = {"num_bits": 4, "type": "int"}
    for layout, dtype, options in [
        ("pack-quantized", "bfloat16", {**int4, "strategy": "group", "group_size": 16, "symmetric": True}),
        ("pack-quantized", "float16", {**int4, "strategy": "group", "group_size": 16, "symmetric": False}),
        ("pack-quantized", "float32", {**int4, "strategy": "channel", "symmetric": False}),
        ("pack-quantized", "bfloat16", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        ("pack-quantized", "bfloat16", {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", "bfloat16", {"num_bits": 3, "strategy": "group", "group_size": 16, "symmetric": False}),
        ("int-quantized", "bfloat16", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        ("int-quantized", "float32", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
        ("float-quantized", "bfloat16", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", "float32", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "float-quantized",
            "bfloat16",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
        ),
        ("naive-quantized", "float16", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    ]:
        sides = "" if options.get("symmetric", True) else " asymmetric"
        words = f"{options.get('type', 'int')}{options['num_bits']} {options['strategy']}{sides}"
        write = partial(compressed, layout=layout, dtype=getattr(torch, dtype), **options)
        formats[f"{layout} {words} {dtype}"] = Format(compressed_settings(layout, **options), write)
    for words, block, scale_fmt in [
        ("blocks", [16, 32], "float"),
        ("exponents", [16, 32], "ue8m0"),
        ("tensor", None, "float"),
    ]:
        settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
        formats[f"fp8 {words}"] = Format(settings, partial(fp8, block=block, scale_fmt=scale_fmt))
    formats["fbgemm_fp8"] = Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fbgemm)
    formats["mxfp4"] = Format({"quant_method": "mxfp4"}, mxfp4)
    torchao = {"quant_method": "torchao", "quant_type": {"default": {"_type": "any"}}}
    formats["torchao int8"] = Format(torchao, torchao_int8)
    formats["torchao intx"] = Format(torchao, partial(torchao_intx, group_size=32))
    formats["torchao int4"] = Format(torchao, partial(torchao_int4, group_size=32))
    return formats


FORMATS = _formats()


def split(tensors: Any) -> tuple[Tensors, dict[str, str]]:
    """The tensors that a writer gave, and the texts for the file's header, which torchao alone has."""
    return tensors if isinstance(tensors, tuple) else (tensors, {})


def save(folder: Any, model: Any, form: Format, *, every: str = "_proj") -> dict[str, torch.Tensor]:
    """Write a model of transformers with its linear layers quantized; returns the weights that are to be read."""
    config = {**model.config.to_dict(), "quantization_config": form.settings}
    (folder / "config.json").write_text(json.dumps(config))
    stored: Tensors = {}
    want: Tensors = {}
    names: list[str] = []
    texts: dict[str, str] = {}
    for key, tensor in model.state_dict().items():
        if every not in key or not key.endswith(".weight"):
            stored[key] = want[key] = tensor
            continue
        written, want[key] = form.write(key.removesuffix(".weight"), tensor)
        parts, header = split(written)
        stored |= parts
        names += json.loads(header.pop("tensor_names", "[]"))
        texts |= header
    texts |= {"tensor_names": json.dumps(names)} if names else {}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt", **texts})
    return want
