"""The files of a Hugging Face checkpoint: JSON, and safetensors in one file or in shards with an index."""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.file_names import is_path_below
from peft_jax.core.short_errors import shortened
from peft_jax.core.text_files import parse_object, read_object

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
# What the parts of quantized weights are stored in beside these.
PACKED_DTYPES = {
    **{"I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": jnp.float8_e8m0fnu},
}
LISTED, NAME = 5, 120  # how many items an error lists, and characters of each

Path = str | os.PathLike[str]


class LazyArray(Protocol):
    """An array that is read, or computed, when it is used: one mapped into memory, or a quantized weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its element type."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""

    def __len__(self) -> int: ...

    def __array__(self) -> np.ndarray[Any, np.dtype[Any]]: ...


class Tensor(NamedTuple):
    """A tensor to be written: its key, its bytes, and how to make it when its file's turn has come."""

    key: str
    nbytes: int
    make: Callable[[], np.ndarray]


def read_config(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    """Read the JSON object of a checkpoint's ``config.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not UTF-8 text or not a JSON object.
    """
    path = pathlib.Path(folder) / file
    if not path.is_file():
        packed = sorted(one.name for one in pathlib.Path(folder).glob("*.gguf"))
        rule = f"Save the checkpoint with save_pretrained('{folder}')."
        if packed:
            rule = f"Found {packed[0]}: name it as gguf_file."
        raise FileNotFoundError(f"No {file} in '{folder}'. {rule}")
    rule = "Copy or save the checkpoint again."
    return read_object(path, file, rule, f"'{path}'")


def open_tensors(folder: Path, ignored: Sequence[str] = (), *, packed: bool = False) -> dict[str, np.ndarray]:
    """Map all tensors of a checkpoint into memory, by key; nothing is read before it is used.

    Args:
        folder: Folder of the checkpoint.
        ignored: Regexes of keys to leave out, whatever the type of their tensors.
        packed: Whether tensors may be integers and fp8 too, as parts of quantized weights are.

    Raises:
        FileNotFoundError: if there are no safetensors files, or a shard is missing.
        ValueError: if a file is damaged or cut off, or not in float32, float16 or bfloat16, or the index names a file
            that is not below the folder.
    """
    dtypes = {**DTYPES, **PACKED_DTYPES} if packed else DTYPES
    files, shards = _weight_files(pathlib.Path(folder))
    tensors: dict[str, np.ndarray] = {}
    for name, file in sorted(files.items()):
        for key, tensor in _map_file(file, ignored, dtypes).items():
            if shards is None or shards.get(key) == name:
                tensors[key] = tensor
    return tensors


def open_metadata(folder: Path) -> dict[str, str]:
    """The texts in the headers of a checkpoint's safetensors files.

    Raises:
        FileNotFoundError: As `open_tensors`.
        ValueError: As `open_tensors`.
    """
    files, _ = _weight_files(pathlib.Path(folder))
    texts: dict[str, str] = {}
    for _, file in sorted(files.items()):
        texts |= _read_header(file)[0].get("__metadata__", {})
    return texts


def _weight_files(folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint by name, and which tensor is in which of them if there is an index."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: folder / WEIGHTS}, None
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"Found {pickled[0]}: load it in PyTorch and save it anew" if pickled else "Save the checkpoint"
        raise FileNotFoundError(f"No {WEIGHTS} and no {INDEX} in '{folder}'. {hint} with save_pretrained.")
    shards: Any = read_config(folder, INDEX).get("weight_map")
    if not is_kind(shards, dict[str, str]):
        raise ValueError(f"'{folder / INDEX}' has no weight_map of keys to files. Save the checkpoint again.")
    files = {name: folder / name for name in sorted(set(shards.values()))}
    if outside := [name for name in files if not is_path_below(name)]:
        raise ValueError(
            f"'{folder / INDEX}' names {outside}, which are not below its folder. Name files that lie beside it."
        )
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise FileNotFoundError(f"{INDEX} in '{folder}' names {missing}, which are not there. Copy all shards.")
    return files, shards


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or cut off ({error}). Copy or save the checkpoint again.") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length).decode()  # UTF-8, according to the check
    return parse_object(header, f"the header of '{path}'", "Copy or save the checkpoint again."), 8 + length


def _map_file(path: pathlib.Path, ignored: Sequence[str], dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    header, begin = _read_header(path)
    header.pop("__metadata__", None)
    header = {key: entry for key, entry in header.items() if not matches_some(ignored, key)}
    odd = [(key, entry["dtype"]) for key, entry in header.items() if entry["dtype"] not in dtypes]
    if odd:
        also = ", nor integers or fp8" if len(dtypes) > len(DTYPES) else ""
        raise ValueError(f"'{path}' has tensors that are not float32, float16 or bfloat16{also}: {some(odd)}.")
    data = np.memmap(path, np.uint8, "r")[begin:]
    tensors = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[key] = data[start:stop].view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def matches_some(patterns: Iterable[str], key: str) -> bool:
    """Whether one of some regular expressions matches a whole key."""
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def save_tensors(tensors: Mapping[str, np.ndarray], file: pathlib.Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: If the disk is full, or for another reason of the system's.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.name.strip('.').removesuffix('.part')} cannot be written: {error}") from error


def write_files(
    folder: pathlib.Path, tensors: Sequence[Tensor], texts: Mapping[str, Mapping[str, Any]], max_shard_size: int
) -> None:
    """Write tensors and JSON files, each under another name first, and rename them all when they are complete.

    The old ``config.json`` is removed before the first and the new one is put in place after the last, so that a
    folder with both old and new weights has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_size)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    if len(shards) > 1:
        places = dict[str, str]()
        for name, shard in zip(names, shards, strict=True):
            places |= dict.fromkeys([tensor.key for tensor in shard], name)
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
        texts = {INDEX: {"metadata": metadata, "weight_map": places}, **texts}
    parts = {name: folder / f".{name}.part" for name in (*names, *texts)}
    try:
        for name, shard in zip(names, shards, strict=True):
            save_tensors({tensor.key: tensor.make() for tensor in shard}, parts[name])
        for name, text in texts.items():
            parts[name].write_text(json.dumps(text, indent=2) + "\n")
        for name in names:
            shutil.copymode(parts[CONFIG], parts[name])  # safetensors lets the owner alone read what it writes
        for old in (folder / CONFIG, *folder.glob("model*.safetensors"), folder / INDEX):
            old.unlink(missing_ok=True)
        for name in sorted(parts, key=lambda name: name == CONFIG):
            os.replace(parts[name], folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _split(tensors: Sequence[Tensor], max_size: int) -> list[list[Tensor]]:
    """Tensors in order, in groups of at most max_size bytes or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def some(items: Iterable[Any]) -> str:
    """List the first few items, and how many more there are."""
    told = [shortened(str(item), NAME) for item in items]
    return ", ".join(told[:LISTED]) + (f" and {len(told) - LISTED} more" if len(told) > LISTED else "")
