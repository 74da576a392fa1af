"""Opens GGUF files by the package gguf, an optional one, and says in one line what is wrong with a file."""

import functools
import os
from pathlib import Path
from typing import Any

from peft_jax.core.file_names import is_path_below

INSTALL = "Install it, in a clone: pip install '.[gguf]'"


class GGUFFile:
    """A GGUF file that is mapped into memory: its metadata and its tensors as they are stored.

    Attributes:
        path: The file.
        architecture: What its metadata call its ``general.architecture``.
        tensors: The package's record of each tensor, by GGUF's name for it: type, shape and stored blocks.
    """

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._fields = reader.fields
        self.architecture = str(self.get("general.architecture"))
        self.tensors: dict[str, Any] = {str(tensor.name): tensor for tensor in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key: a number, a text or a list of such.

        Raises:
            ValueError: if it cannot be read.
        """
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            return field.contents()
        except (ValueError, IndexError) as error:
            raise _damaged(self.path, error) from error


def open_gguf(folder: str | os.PathLike[str], name: str) -> GGUFFile:
    """Open a GGUF file in a folder; one that was opened last and has not changed is not read again.

    Args:
        folder: The folder.
        name: The file's name in it.

    Raises:
        FileNotFoundError: if there is no such file; the message lists those that there are.
        ValueError: if the package gguf is not installed, the name leads out of the folder, or the file is damaged.
    """
    if not is_path_below(name):
        raise ValueError(f"gguf_file={name!r} is not below the folder '{folder}'. Name a file in it.")
    path = Path(folder) / name
    if not path.is_file():
        there = sorted(file.name for file in Path(folder).glob("*.gguf"))
        rule = f"Write gguf_file= one of {', '.join(there)}." if there else "There is no GGUF file in it."
        raise FileNotFoundError(f"No file '{name}' in '{folder}'. {rule}")
    stat = path.stat()
    return _open(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)  # a command reads config, tokenizer and tensors, and a vocabulary takes seconds
def _open(path: Path, changed: int, size: int) -> GGUFFile:
    try:
        from gguf import GGUFReader  # an optional dependency
    except ImportError as error:
        raise ValueError(f"reading '{path}' needs the package gguf. {INSTALL}") from error
    try:
        reader = GGUFReader(path)
        file = GGUFFile(path, reader)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, error) from error
    if reader.byte_order == "S":
        raise ValueError(f"'{path}' is in the byte order of other machines. Take a little-endian copy.")
    if file.get("general.architecture") is None:
        raise ValueError(
            f"'{path}' has no general.architecture in its metadata. Take a GGUF file of a model's weights."
        )
    return file


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"'{path}' is no GGUF file, damaged or cut off ({reason}). Take an undamaged copy.")
