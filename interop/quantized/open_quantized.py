"""The table of formats by ``quant_method``, and the reading of a quantized checkpoint by it."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.files import DTYPES, LazyArray, open_metadata, open_tensors
from peft_jax.interop.quantized.awq import read_awq
from peft_jax.interop.quantized.base import COPY, QuantizedTensor, Settings, StoredTensors, Transposed
from peft_jax.interop.quantized.bitsandbytes import read_bitsandbytes
from peft_jax.interop.quantized.compressed_tensors import read_compressed_tensors
from peft_jax.interop.quantized.fp8 import read_fp8
from peft_jax.interop.quantized.gptq import read_gptq
from peft_jax.interop.quantized.mxfp4 import read_mxfp4
from peft_jax.interop.quantized.torchao import read_torchao

FORMATS: Mapping[str, Callable[[Settings, StoredTensors], Iterator[QuantizedTensor]]] = {
    "bitsandbytes": read_bitsandbytes,
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "mxfp4": read_mxfp4,
    "torchao": read_torchao,
}


def check_quant_method(settings: Settings) -> str:
    """The ``quant_method`` of a quantization_config; old ones of bitsandbytes name none.

    Raises:
        ValueError: It is not read here.

    Example:
        >>> check_quant_method({"load_in_4bit": True})
        'bitsandbytes'
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config in config.json is an object, found {settings!r}. {COPY}")
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in FORMATS:
        raise ValueError(
            f"The checkpoint is quantized with quant_method={method!r}, which is not supported. Supported: "
            f"{', '.join(FORMATS)}. Load one of these, or the unquantized checkpoint with load_in_8bit=True."
        )
    return str(method)


def open_quantized(
    folder: str | os.PathLike[str], settings: Settings, ignored: Sequence[str] = ()
) -> tuple[dict[str, LazyArray], str]:
    """Map the tensors of a quantized checkpoint into memory, and say what they are.

    Args:
        folder: Folder of the checkpoint.
        settings: The ``quantization_config`` of its ``config.json``.
        ignored: Regexes of keys to leave out.

    Returns:
        What `read_quantized` returns.

    Raises:
        FileNotFoundError: As `open_tensors`.
        ValueError: As `open_tensors` and `read_quantized`.
    """
    tensors = open_tensors(folder, ignored, packed=True)
    return read_quantized(settings, tensors, open_metadata(folder))


def read_quantized(
    settings: Settings, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, LazyArray], str]:
    """Put packed weights together.

    Args:
        settings: The ``quantization_config`` of a checkpoint.
        tensors: Its tensors, as from `open_tensors` with ``packed=True``.
        metadata: The texts in the headers of its files.

    Returns:
        Tensors under the keys of a checkpoint that is not quantized, the packed ones as `QuantizedTensor`; and words
        on how many weights are quantized and in how many bytes.

    Raises:
        ValueError: The format or a layout of it is not read, or a tensor is missing or does not fit the others.

    Example:
        >>> stored = {"up.weight": np.array([[-127, 254 // 2]], np.int8), "up.SCB": np.array([2.0], np.float32)}
        >>> tensors, words = read_quantized({"quant_method": "bitsandbytes", "load_in_8bit": True}, stored)
        >>> np.asarray(tensors["up.weight"]).tolist()
        [[-2.0, 2.0]]
        >>> words
        '1 weights quantized by bitsandbytes in 6 bytes, whose quantization of activations is not applied'
    """
    method = check_quant_method(settings)
    stored = StoredTensors(tensors, metadata or {})
    weights = {weight.key: weight for weight in FORMATS[method](settings, stored)}
    if both := sorted(weights.keys() & stored.left.keys()):
        raise ValueError(f"The checkpoint's weight '{both[0]}' is there twice, quantized and not. {COPY}")
    plain = [np.dtype(dtype) for dtype in DTYPES.values()]
    lone = next((key for key, tensor in stored.left.items() if tensor.dtype not in plain), None)
    if lone is not None:
        raise ValueError(
            f"The checkpoint's tensor '{lone}' is {stored.left[lone].dtype}, and what {method} stores beside such a "
            f"tensor, as a scale, is missing. {COPY}"
        )
    count, nbytes = len(weights), sum(weight.packed_nbytes for weight in weights.values())
    words = f"{count} weights quantized by {method} in {nbytes:,} bytes"
    if stored.quantizes_activations:
        words += ", whose quantization of activations is not applied"
    return {**stored.left, **weights}, words


def fit_quantized(tensors: Mapping[str, LazyArray], rows: Sequence[Row]) -> dict[str, LazyArray]:
    """Quantized weights as the plain tensors of a model are laid out.

    A kernel that plain checkpoints store as ``(in, out)`` is transposed, as all formats store ``(out, in)``. A bias of
    zeros that some writers give every quantized layer is left out where the model has none.

    Args:
        tensors: Tensors by key, as from `open_quantized`.
        rows: What the model's tree consists of.
    """
    fitted = dict(tensors)
    wanted = set[str]()
    for row in rows:
        wanted.update(row.keys)
        stored_in_out = row.path.endswith("kernel") and not row.transposed
        for key in row.keys if stored_in_out else ():
            if isinstance(tensor := fitted.get(key), QuantizedTensor):
                fitted[key] = Transposed.of(tensor)
    for key, tensor in tensors.items():
        bias = re.sub(r"weight$", "bias", key)
        if isinstance(tensor, QuantizedTensor) and bias in tensors and bias not in wanted:
            if not np.any(np.asarray(tensors[bias])):
                del fitted[bias]
    return fitted


def notice(
    name_or_path: str | os.PathLike[str],
    words: str,
    tensors: Mapping[str, LazyArray],
    dtype: str | np.dtype[Any],
    rounded: str | None,
) -> str:
    """One line on what becomes of quantized weights, and how many bytes they take then.

    Args:
        name_or_path: The checkpoint.
        words: What `read_quantized` says of it.
        tensors: Its tensors.
        dtype: The element type of the parameters.
        rounded: The format that those of the layers are rounded to afterwards; None if they are not.
    """
    dtype = jnp.dtype(dtype)
    weights = [tensor for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)]
    nbytes = sum(math.prod(weight.shape) for weight in weights) * dtype.itemsize
    after = "" if rounded is None else f"; those of the layers are then rounded to {rounded}"
    return f"'{name_or_path}' has {words}. They are dequantized to {dtype} in {nbytes:,} bytes{after}."
