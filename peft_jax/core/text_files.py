"""Reading text files and JSON objects: the one place that opens them and says in one line why they cannot be used."""

from pathlib import Path
from typing import Any

from peft_jax.core.strict_json import JSONError, parse_json

LARGEST = 10**8  # bytes of a file that holds one object


def read_text(file: Path, called: str, rule: str) -> str:
    """Read a file as UTF-8 text, without a byte order mark.

    Args:
        file: The file.
        called: What the file is, for errors: "data file".
        rule: What to write instead, for errors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text.
    """
    check_there(file, called, rule)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text. {rule}") from error


def check_there(file: Path, called: str, rule: str) -> None:
    """Raise FileNotFoundError unless there is such a file; arguments are those of `read_text`."""
    if not file.is_file():
        kind = ", which is a folder" if file.is_dir() else ""
        raise FileNotFoundError(f"no {called} at {file}{kind}. {rule}")


def parse_object(text: str, subject: str, rule: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The text.
        subject: The file that the text is from, as errors are to name it.
        rule: What to write instead, for errors.

    Raises:
        ValueError: If it is not JSON or not an object.

    Example:
        >>> parse_object('{"r": 4}', "adapter_config.json", "Save the adapter again.")
        {'r': 4}
    """
    try:
        found = parse_json(text)
    except JSONError as error:
        raise ValueError(f"{subject} is not JSON ({error}). {rule}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{subject} is not a JSON object but {type(found).__name__}. {rule}")
    return found


def read_object(file: Path, called: str, rule: str, subject: str = "") -> dict[str, Any]:
    """Read a JSON object from a file; arguments are those of `read_text`.

    Args:
        file: The file.
        called: What the file is, for errors.
        rule: What to write instead, for errors.
        subject: How errors name it, if not as ``called`` and the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text, too large, not JSON (`peft_jax.core.strict_json.parse_json`) or not an object.
    """
    subject = subject or f"the {called} {file}"
    if file.is_file() and (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"{subject} has {size} bytes, more than {LARGEST} that one object may have. {rule}")
    return parse_object(read_text(file, called, rule), subject, rule)
