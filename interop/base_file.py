"""The file beside an adapter that says which file of its base's folder holds the weights, where that needs saying.

PEFT's adapter_config.json has a field for the folder alone, and warns of fields that it does not know.
"""

import json
import os
import pathlib

from peft_jax.core.text_files import read_object

BASE_FILE = "gguf_base.json"
RULE = "Copy the adapter again, or name the base and its file yourself."


def write_base_file(folder: str | os.PathLike[str], gguf_file: str | None) -> None:
    """Write the name of the base's GGUF file, or remove what a former adapter left if it has none."""
    path = pathlib.Path(folder) / BASE_FILE
    if gguf_file is None:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f".{BASE_FILE}.part")
    try:
        part.write_text(json.dumps({"gguf_file": gguf_file}, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_base_file(folder: str | os.PathLike[str]) -> str | None:
    """The name of the GGUF file that an adapter's base is in; None for a base of safetensors.

    Raises:
        ValueError: if the file beside the adapter is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_base_file(folder, "model.Q4_K_M.gguf")
        ...     read_base_file(folder)
        'model.Q4_K_M.gguf'
    """
    path = pathlib.Path(folder) / BASE_FILE
    if not path.is_file():
        return None
    name = read_object(path, BASE_FILE, RULE, f"'{path}'").get("gguf_file")
    if not isinstance(name, str):
        raise ValueError(f"'{path}' has no gguf_file that is a name. {RULE}")
    return name
