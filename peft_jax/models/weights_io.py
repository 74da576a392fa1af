"""Models to and from Hugging Face checkpoints."""

import dataclasses
import functools
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.selecting import not_none, present
from peft_jax.core.strict_json import shown
from peft_jax.interop.checkpoint import find_checkpoint, load_params, open_tensors, read_config, save_checkpoint
from peft_jax.interop.files import GENERATION_CONFIG, LazyArray
from peft_jax.interop.fused_experts import with_fused_experts
from peft_jax.interop.host_read import Cast
from peft_jax.interop.quantized import fit_quantized, notice, open_quantized
from peft_jax.models.checkpoint_keys import fit_keys, fresh_rows, unused
from peft_jax.models.config import ModelConfig
from peft_jax.models.family import leaf_at, with_leaf
from peft_jax.models.gguf_checkpoint import (
    base_config,
    base_files,
    dequantized_note,
    gguf_tensors,
    gguf_words,
    open_base,
)
from peft_jax.models.hf_config import label_fields
from peft_jax.models.kept_quantized import kept_leaves, kept_notice, refuse_options
from peft_jax.models.load_rounding import LoadRounding, load_rounding
from peft_jax.models.registry import family_of, read_architecture
from peft_jax.quant import BitsAndBytesConfig
from peft_jax.quant.float_blocks import double_quantized

DTYPES = ("float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A checkpoint as it was read: architecture, parameters, and paths of the leaves that it lacked."""

    config: ModelConfig
    params: dict[str, Any]
    fresh: tuple[str, ...]


def load_model(name_or_path: str | os.PathLike[str], **options: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """Architecture and parameters of a checkpoint; options and errors are those of `read_model`."""
    return read_model(name_or_path, **options)[:2]


def read_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    quantization_config: BitsAndBytesConfig | None = None,
    keep_quantized: bool = False,
    gguf_file: str | None = None,
    key: jax.Array | None = None,
    **changes: Any,
) -> Loaded:
    """Read architecture and parameters of a checkpoint, and say which of them it lacks, which start at random.

    Quantized weights (`peft_jax.interop.quantized`) are dequantized tensor by tensor unless ``keep_quantized`` says
    otherwise. A warning says what became of them, and how many bytes they take.

    Args:
        name_or_path: A folder, or an id on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16", for all floating-point leaves; None for the one that config.json
            names, or else that of the first tensor.
        load_in_8bit: Whether to round the linear kernels of the layers to int8, tensor by tensor while loading.
            Embedding, norms, biases and head stay floating-point.
        load_in_4bit: The same in NF4, in blocks of 64.
        quantization_config: The same with all options.
        keep_quantized: Whether the matrices of a quantized checkpoint, or of a GGUF file, stay in its own bits where a
            weight of `peft_jax.quant` holds them exactly. Their values are those of the dequantized ones.
        gguf_file: Name of a GGUF file in the folder, from which all is read instead, as a quantized checkpoint is. A
            warning says the bytes that the weights then take. dtype=None means float32 for one with quantized weights.
        key: Random key for a head that the checkpoint does not have; None means ``jax.random.key(0)``.
        **changes: Fields of the config that are not to be as in config.json: ``task_type``, ``num_labels``, ...

    Raises:
        FileNotFoundError: There is no such folder or id, or a file is missing in it.
        ValueError: The model is of another family or asks for something that is not supported, a file is damaged, the
            tensors are not those of the config, several ways of quantizing are asked for, or there are no quantized
            weights to keep.
    """
    folder = find_checkpoint(name_or_path, base_files(gguf_file))
    hf = base_config(folder, gguf_file)
    found = read_architecture(hf)
    family = family_of(found)
    quantization = hf.get("quantization_config")
    tensors, packed = _opened(folder, quantization, gguf_file, found)
    if gguf_file is None:
        found = _with_generation_ids(found, folder)
    config = dataclasses.replace(found, **changes)
    if dtype is None:
        dtype = hf.get("dtype") or hf.get("torch_dtype") or next(iter(tensors.values())).dtype
    if _dtype_name(dtype) not in DTYPES:
        raise ValueError(f"dtype={shown(dtype)} is not supported. Write dtype= one of {', '.join(DTYPES)}.")
    config, fitted = family.settled(config, fit_keys(family, config, tensors))
    rows = family.rows(config)
    fitted = with_fused_experts(fitted, rows)
    if keep_quantized:
        others = {"load_in_8bit=True": load_in_8bit, "load_in_4bit=True": load_in_4bit}
        refuse_options(name_or_path, fitted, {**others, "quantization_config": quantization_config is not None})
    if quantization:
        fitted = fit_quantized(fitted, rows)
    fresh = fresh_rows(family, config, rows, fitted)
    rounding = load_rounding(
        config,
        rows,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        quantization_config=quantization_config,
    )
    if quantization and not keep_quantized:
        rounded = None if rounding is None else rounding.quantizer.kind
        warnings.warn(notice(name_or_path, packed, fitted, dtype, rounded), stacklevel=3)
    convert = _converter(config, jnp.dtype(dtype), rounding)
    kept = {}
    if keep_quantized:
        kept = kept_leaves(config, rows, fitted, functools.partial(_own_dtype, config, jnp.dtype(dtype)))
    read = [row for row in rows if row not in fresh]
    params = load_params(fitted, read, convert, ignored=unused(family), kept=kept)
    if rounding is not None and rounding.quantizer.double_quant:
        params = double_quantized(params)
    paths = tuple(row.path for row in fresh)
    if keep_quantized:
        warnings.warn(kept_notice(name_or_path, packed, rows, kept, fitted, params, jnp.dtype(dtype)), stacklevel=3)
    elif gguf_file is not None and (note := dequantized_note(folder, gguf_file, params)):
        warnings.warn(note, stacklevel=3)
    if fresh:
        warnings.warn(
            f"The checkpoint in '{name_or_path}' has no {', '.join(paths)}: they start at random. Train them, or "
            "load an adapter that holds them.",
            stacklevel=3,
        )
        started = random_leaves(config, paths, jnp.dtype(dtype), jax.random.key(0) if key is None else key)
        for path, leaf in started.items():
            params = with_leaf(params, path, leaf)
    return Loaded(config, params, paths)


def _dtype_name(dtype: DTypeLike) -> str:
    """The name of an element type; empty for what is none."""
    if isinstance(dtype, str):
        return dtype
    try:
        return str(jnp.dtype(dtype).name)
    except (TypeError, ValueError):  # as NumPy has it
        return ""


def _opened(
    folder: pathlib.Path, quantization: Any, gguf_file: str | None, config: ModelConfig
) -> tuple[dict[str, LazyArray], str]:
    """The tensors of a checkpoint by key, dequantized as they are read, and words on its quantized ones."""
    if gguf_file is not None:
        tensors = gguf_tensors(open_base(folder, gguf_file), config)
        return dict(tensors), gguf_words(tensors)
    ignored = family_of(config).ignored
    if quantization:
        return open_quantized(folder, quantization, ignored)
    return dict(open_tensors(folder, ignored)), ""


def random_leaves(
    config: ModelConfig, paths: tuple[str, ...], dtype: jnp.dtype, key: jax.Array
) -> dict[str, jax.Array]:
    """Random leaves; the others of the model are not made."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        params = family_of(config).init_params(config, key, dtype)
        return {path: leaf_at(params, path) for path in paths}

    return jax.jit(make)(key)


@functools.lru_cache(maxsize=8)
def _converter(config: ModelConfig, dtype: jnp.dtype, rounding: LoadRounding | None) -> Callable[[str, jax.Array], Any]:
    """Make what happens to each tensor on its way; one function for each choice, so that programs are shared."""
    own_dtype = functools.partial(_own_dtype, config, dtype)
    if rounding is None:
        return Cast(own_dtype)

    def convert(path: str, array: jax.Array) -> Any:
        layout, own = rounding.layout(path), own_dtype(path)
        if layout is None:
            return array.astype(own)
        quantizer = rounding.quantizer.without_double_quant()
        return quantizer(array, layout).astype(own)  # rounded once, from the stored element type

    return convert


def _own_dtype(config: ModelConfig, dtype: jnp.dtype, path: str) -> jnp.dtype:
    """The element type of a leaf: some stay in float32 where the others are in float16, or in less at all."""
    family = family_of(config)
    wide = dtype == jnp.float16 and re.fullmatch(family.float32, path)
    return jnp.dtype(jnp.float32) if wide or re.fullmatch(family.always_float32, path) else dtype


def save_model(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | os.PathLike[str],
    *,
    generation_config: Mapping[str, Any] | None = None,
    id2label: Mapping[int, str] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a checkpoint that transformers reads, in the element types of the leaves.

    Args:
        params: The parameters, dense arrays, as from `Family.init_params`.
        config: Their architecture.
        folder: Folder to write to; made if need be. Weights of a former checkpoint in it are removed.
        generation_config: Contents of generation_config.json; not written if there are none.
        id2label: Names of a classifier's labels.
        max_shard_size: Bytes above which the weights are split into several files.

    Raises:
        ValueError: No Hugging Face class has this combination of config fields.

    Example:
        >>> import tempfile
        >>> from peft_jax.models import LlamaConfig
        >>> from peft_jax.models.registry import LLAMA
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(LLAMA.init_params(config, jax.random.key(0)), config, folder)
        ...     load_model(folder)[0] == config
        True
    """
    family = family_of(config)
    dtype = str(jnp.dtype(family.embedding_table(config, params).dtype))
    hf = {**config.to_hf(), **(label_fields(id2label) if id2label else {}), "dtype": dtype}
    generation = dict(generation_config) if generation_config else None
    rows = family.written_rows(config)
    save_checkpoint(folder, params, rows, hf, generation_config=generation, max_shard_size=max_shard_size)


def read_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read generation_config.json; empty if there is none.

    Raises:
        ValueError: It is not a JSON object.
    """
    try:
        return read_config(folder, GENERATION_CONFIG)
    except FileNotFoundError:
        return {}


def _with_generation_ids(config: ModelConfig, folder: os.PathLike[str]) -> ModelConfig:
    """Take the ids that end and pad a text from generation_config.json, which transformers' generate heeds first."""
    found = read_generation_config(folder)
    ids: dict[str, Any] = not_none(present(found, ("eos_token_id", "pad_token_id")))
    ids = {name: tuple(value) if isinstance(value, list) else value for name, value in ids.items()}
    for name, value in ids.items():
        if not is_kind(value, int | tuple[int, ...]):
            raise ValueError(f"{GENERATION_CONFIG} has {name}={shown(value)}. Write the number of a token, or several.")
    return dataclasses.replace(config, **ids)
