"""The base of a model from a GGUF file: config and tensors under the names of a Hugging Face checkpoint."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from peft_jax.core.gguf_metadata import GGUFFile, open_gguf
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import not_none, without
from peft_jax.interop.checkpoint import HUB_FILES, find_checkpoint, read_config
from peft_jax.interop.files import some
from peft_jax.interop.gguf_file import AlternatingTensor, GGUFTensor, float_type, kinds_of, read_tensors
from peft_jax.models.config import ModelConfig
from peft_jax.models.family import Family
from peft_jax.models.gguf_architecture import GGUFArchitecture
from peft_jax.models.registry import GGUF_ARCHITECTURES, family_of

Path = str | os.PathLike[str]

EXPERT = re.compile(r"\.experts\.\d+\.")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TOKEN_IDS = {  # keys of the tokenizer's metadata, and the fields of config.json that they are
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


class Place(NamedTuple):
    """Tensors of a file and those of a checkpoint that they are: one is one, or several ones on one side.

    Attributes:
        names: GGUF's names; several are tensors whose outputs take turns in the checkpoint's.
        keys: The checkpoint's keys; several are those of the experts in the file's tensor, one by one.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]


def base_config(name_or_path: Path, gguf_file: str | None = None) -> dict[str, Any]:
    """The contents of a checkpoint's config.json, or the same fields from a GGUF file's metadata.

    Args:
        name_or_path: Folder, or id on the Hugging Face hub.
        gguf_file: Name of a GGUF file in it, which is read instead of config.json.

    Raises:
        FileNotFoundError: if there is no such checkpoint or no such file in it.
        ValueError: if it is damaged, or a GGUF file of an architecture that is not supported.
    """
    if gguf_file is None:
        return read_config(find_checkpoint(name_or_path))
    return _config(open_base(name_or_path, gguf_file))


def open_base(name_or_path: Path, gguf_file: str) -> GGUFFile:
    """Open a GGUF file of a folder, or of an id on the Hugging Face hub, from which that file alone is downloaded."""
    return open_gguf(find_checkpoint(name_or_path, base_files(gguf_file)), gguf_file)


def base_files(gguf_file: str | None) -> tuple[str, ...]:
    """Patterns of the files that a base consists of."""
    return HUB_FILES if gguf_file is None else (gguf_file,)


def gguf_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, Any]:
    """Tensors of a GGUF file under a checkpoint's keys, as arrays that are dequantized where they are read.

    Args:
        file: The file.
        config: The architecture that its metadata name, as `base_config` tells it.

    Raises:
        ValueError: if a tensor is missing, left over or of a kind that cannot be dequantized.
    """
    row, family = _row(file), family_of(config)
    places = _places(file, family, config)
    stored = without(read_tensors(file), row.ignored)
    wanted = {name for place in places for name in place.names}
    missing, surplus = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
    if missing or surplus:
        problems = {"missing": missing, "left over": surplus}
        told = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"The tensors of '{file.path}' are not those of its architecture {file.architecture!r}. {told}. "
            "Take an undamaged copy, or the checkpoint that the file was made from."
        )
    found: dict[str, Any] = {}
    for names, keys in places:
        restored = [row.restore(stored[name], config) for name in names]
        if len(names) > 1:
            found[keys[0]] = _alternating(file, restored)
            continue
        (tensor,) = restored
        if len(keys) == 1:
            found[keys[0]] = tensor
            continue
        if len(tensor) != len(keys):
            raise ValueError(
                f"'{file.path}' has {len(keys)} experts by its metadata, and {len(tensor)} in {tensor.name}. "
                "Take an undamaged copy, or the checkpoint that the file was made from."
            )
        for number, key in enumerate(keys):
            found[key] = tensor.part(number)
    return found


def _alternating(file: GGUFFile, parts: Sequence[GGUFTensor]) -> AlternatingTensor:
    try:
        return AlternatingTensor(parts)
    except ValueError as error:
        raise ValueError(
            f"In '{file.path}' {error}. Take an undamaged copy, or the checkpoint that the file was made from."
        ) from error


def gguf_words(tensors: Mapping[str, Any]) -> str:
    """The number of weights of a file that are stored in blocks, of which kinds, and in how many bytes."""
    packed = [tensor for tensor in tensors.values() if tensor.is_quantized]
    size = sum(tensor.packed_nbytes for tensor in packed)
    return f"{len(packed)} weights quantized as {', '.join(kinds_of(packed))} in {size:,} bytes"


def dequantized_note(name_or_path: Path, gguf_file: str, params: PyTree) -> str:
    """The line that says what a GGUF file's weights became and the bytes they take; empty for one of plain values."""
    kinds = kinds_of(read_tensors(open_base(name_or_path, gguf_file)).values())
    if not kinds:
        return ""
    leaves = jax.tree.leaves(params)
    size, types = sum(leaf.nbytes for leaf in leaves), sorted({leaf.dtype.name for leaf in leaves})
    return (
        f"The weights in {gguf_file} are dequantized from {', '.join(kinds)}: as {' and '.join(types)} they take "
        f"{size:,} bytes."
    )


def _config(file: GGUFFile) -> dict[str, Any]:
    row = _row(file)
    found = {field: file.get(f"{file.architecture}.{key}") for key, field in row.fields.items()}
    lists = sorted(field for field, value in found.items() if isinstance(value, list))
    if lists:
        raise ValueError(
            f"'{file.path}' has another {', '.join(lists)} for each layer, which is not supported for the architecture "
            f"{file.architecture!r}. Take a model whose layers are alike."
        )
    found |= {field: file.get(key) for key, field in TOKEN_IDS.items()}
    hf = not_none(found)
    tensors = read_tensors(file)
    if EMBEDDING not in tensors:
        raise ValueError(f"'{file.path}' has no tensor {EMBEDDING}. Take an undamaged copy.")
    more = row.more_fields(file)
    _check_rope(file, more)
    return {
        "model_type": row.model_type,
        "vocab_size": len(tensors[EMBEDDING]),
        "tie_word_embeddings": HEAD not in tensors,  # llama.cpp writes a head where it is not the embedding
        "dtype": float_type(tensors.values()),
        **hf,
        **more,
    }


def _check_rope(file: GGUFFile, fields: Mapping[str, Any]) -> None:
    """Raise ValueError if a file's positions are stretched and the fields do not say so, as where a row has none."""
    scaling = f"{file.architecture}.rope.scaling"
    kind, factor = file.get(f"{scaling}.type", "none"), file.get(f"{scaling}.factor")
    is_plain = kind == "none" or (kind == "linear" and factor in (None, 1))
    if not is_plain and "rope_scaling" not in fields:
        raise ValueError(f"'{file.path}' has rope.scaling.type={kind!r}, which is not supported. Take another model.")


def _row(file: GGUFFile) -> GGUFArchitecture:
    """The row of a file's architecture.

    Raises:
        ValueError: if there is none.
    """
    if file.architecture not in GGUF_ARCHITECTURES:
        raise ValueError(
            f"'{file.path}' is of the GGUF architecture {file.architecture!r}, which is not supported. Supported: "
            f"{', '.join(GGUF_ARCHITECTURES)}."
        )
    return GGUF_ARCHITECTURES[file.architecture]


def _places(file: GGUFFile, family: Family, config: ModelConfig) -> list[Place]:
    """Which tensors of a file are which of a checkpoint, as gguf maps the names of llama.cpp's converter."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    row = _row(file)
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    depths: Mapping[str, int] = getattr(config, "depths", {"": config.num_hidden_layers})
    names = get_tensor_name_map(numbers[file.architecture], max(depths.values()))

    def name_of(key: str) -> str:
        for spelled in (key, key.removeprefix(f"{family.backbone}.")):  # BLOOM's are those of the model without a head
            if found := names.get_name(spelled, (".weight", ".bias")):
                return str(found)
        return key

    found = []
    for keys in _checkpoint_keys(family, config):
        key = keys[0] if len(keys) == 1 else EXPERT.sub(".experts.", keys[0])
        found.append(Place(tuple(map(name_of, row.converted(key))), keys))
    return found


def _checkpoint_keys(family: Family, config: ModelConfig) -> Iterator[tuple[str, ...]]:
    for row in family.rows(config):
        if row.parts and len(row.tensor_shape) > 2:
            for parts in row.part_keys:
                yield from map(tuple, parts)
        else:
            for key in row.keys:
                yield (key,)
