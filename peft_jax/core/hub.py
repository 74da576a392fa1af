"""Folders of the Hugging Face hub: ids are downloaded into the hub's cache, or found there without a network."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict

from peft_jax.core.file_names import is_path_below
from peft_jax.core.selecting import not_none

Path = str | os.PathLike[str]


class HubOptions(TypedDict, total=False):
    """Arguments of ``from_pretrained`` that say where on the hub a folder is.

    Attributes:
        subfolder: Folder in the repository, or below the given folder.
        revision: Branch, tag or commit.
        token: Access token; None for the one that is logged in, if any.
        cache_dir: The hub's cache; None for the usual one.
        local_files_only: Whether to look in the cache alone, as with ``HF_HUB_OFFLINE=1``.
    """

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool


ADAPTER_FILES = ("*.json", "adapter_model.safetensors", "tokenizer*", "*.model", "*.txt")


def find_folder(
    name_or_path: Path,
    files: Sequence[str],
    options: HubOptions | None = None,
    *,
    kind: str = "the folder of a saved adapter",
) -> pathlib.Path:
    """The folder that a path names, or the copy of one that a hub id names.

    Args:
        name_or_path: Folder, or id on the Hugging Face hub.
        files: Patterns of the files to download.
        options: Where on the hub.
        kind: Words for such a folder, for an error.

    Raises:
        FileNotFoundError: if there is no such folder and no such id, or the hub cannot be reached and its cache has no
            copy.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     find_folder(folder, ["*.json"]) == pathlib.Path(folder)
        True
    """
    given = not_none(options or {})
    subfolder = str(given.pop("subfolder", ""))
    if subfolder and not is_path_below(subfolder):
        raise FileNotFoundError(f"subfolder='{subfolder}' is not below '{name_or_path}'. Name a folder in it.")
    folder = pathlib.Path(name_or_path)
    name = os.fspath(name_or_path)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise FileNotFoundError(f"No folder '{name}'. Name {kind}, or an id 'owner/name' on the hub.")
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
        folder = _download(name, patterns, given)
    if subfolder and not (folder / subfolder).is_dir():
        raise FileNotFoundError(f"No folder '{subfolder}' in '{name}'. Found: {_folders(folder)}.")
    return folder / subfolder


def _download(name: str, patterns: list[str], options: dict[str, Any]) -> pathlib.Path:
    import huggingface_hub  # takes a while, and is for ids alone

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:  # the hub's errors are kinds of these
        at = f" at revision '{options['revision']}'" if "revision" in options else ""
        raise FileNotFoundError(
            f"'{name}'{at} is neither a folder nor can it be downloaded from the Hugging Face hub "
            f"({type(error).__name__}). Check the spelling, the network and, for a gated model, your access token."
        ) from error


def _folders(folder: pathlib.Path) -> list[str]:
    """Names of the folders in a folder."""
    return sorted(one.name for one in folder.iterdir() if one.is_dir())
