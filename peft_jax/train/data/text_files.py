"""Files that people write by hand: texts, and objects in JSON, with one line of what is wrong with them."""

import json
from pathlib import Path
from typing import Any


def read_text(file: Path, called: str, rule: str) -> str:
    """The text in a file, without a byte order mark.

    Args:
        file: The file.
        called: What it is, for errors.
        rule: What to write instead, for errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {called} at {file}. {rule}")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text. {rule}") from error


def read_object(file: Path, called: str, rule: str) -> dict[str, Any]:
    """The object in a JSON file; arguments are those of `read_text`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text, not JSON or not an object.
    """
    text = read_text(file, called, rule)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the {called} {file} is not JSON: {error}. {rule}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the {called} {file} is not a JSON object. {rule}")
    return found
