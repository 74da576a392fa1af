"""The metrics of a run: a JSONL file that a killed run can be cut back to, and TensorBoard beside it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from peft_jax.core.text_files import parse_object, read_text

RULE = "Restore the file."
Row = Mapping[str, float | int]


class MetricsLog:
    """A JSONL file that is written row by row; a context manager.

    Args:
        file: The file.
        size: Bytes to keep of it: 0 for a new run, and where a checkpoint says that it was for one that goes on.
        digest: Hash of these bytes, as `digest` was when the checkpoint was saved; None to keep them unchecked.
        on: False to write nothing, as in all processes of a run but the first.

    Raises:
        ValueError: If the file is shorter than that, or these bytes have changed.

    Example:
        >>> with MetricsLog(Path("metrics.jsonl")) as log:
        ...     log.write({"step": 1, "loss": 2.5})
        ...     log.size
        25
        >>> read_metrics(Path("metrics.jsonl"))
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, file: Path, size: int = 0, digest: str | None = None, *, on: bool = True) -> None:
        self._stream, self._hash = None, hashlib.sha256()
        if not on:
            return
        found = file.stat().st_size if file.exists() else 0
        if found < size:
            raise ValueError(f"{file} has {found} bytes, but had {size} when the checkpoint was saved. {RULE}")
        if size:
            with open(file, "rb") as stream:
                self._hash.update(stream.read(size))
        if size and digest is not None and self.digest != digest:
            raise ValueError(
                f"the first {size} bytes of {file} are not those that it had when the checkpoint was saved. {RULE}"
            )
        self._stream = open(file, "ab")
        self._stream.truncate(size)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._stream.fileno()).st_size if self._stream else 0

    @property
    def digest(self) -> str:
        """Hash of all that is in the file."""
        return self._hash.hexdigest()

    def write(self, row: Row) -> None:
        """Append a row; it is in the file when this returns.

        Raises:
            ValueError: If a number is not finite, which JSON has no word for.
        """
        if self._stream:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            self._stream.write(line)
            self._stream.flush()
            self._hash.update(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream:
            self._stream.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file.

    Raises:
        ValueError: If a line is not a JSON object, or a number in it is not finite.
    """
    text = read_text(file, "metrics file", RULE)
    lines = text.splitlines()
    return [parse_object(line, f"line {number} of {file}", RULE) for number, line in enumerate(lines, 1)]


class TensorBoard:
    """Event files for TensorBoard; a context manager.

    Args:
        folder: Where to write them.
        step: Events after this step are of a run that was cut off, and are withdrawn.
        on: False to write nothing.

    Raises:
        ValueError: If the package tensorboardX is not installed.
    """

    def __init__(self, folder: Path, step: int, *, on: bool) -> None:
        self._writer = None
        if not on:
            return
        try:
            from tensorboardX import SummaryWriter  # an optional dependency
        except ImportError as error:
            raise ValueError(
                "--tensorboard needs the package tensorboardX. Install it, in a clone: pip install '.[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """Add a row's values at its step."""
        for name, value in row.items():
            if self._writer and name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()
