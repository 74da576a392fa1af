r"""Rows of JSONL and Parquet files that stay on the disk: each is read when it is asked for.

Of a JSONL file the places of the lines are kept in memory, 16 bytes a line. Of a Parquet file, whose rows are written
in groups, the groups read last are kept.
"""

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.core.text_files import check_there
from peft_jax.train.data.data_files import (
    COLUMNAR,
    TABLES,
    check_columns,
    damaged,
    ending_of,
    import_arrow,
    is_compressed,
)

SHORT = 16  # bytes of a line that may be blank
PIECE = 2**24  # bytes of a JSONL file that are searched at a time
GROUPS = 4  # of a Parquet file that are kept, and shuffled together
BOM = b"\xef\xbb\xbf"
RULE = "--streaming reads JSONL and Parquet files."


class RowFile(Protocol):
    """Rows on the disk."""

    @property
    def blocks(self) -> Sequence[int] | None:
        """The rows of each part that is read at once; None if single rows are."""

    def __len__(self) -> int:
        """Count the rows."""

    def __getitem__(self, place: int) -> Any:
        """Read a row."""


def open_rows(file: Path) -> RowFile:
    r"""Open a JSONL or Parquet file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another format, empty or damaged, or needs a package that is not installed.

    Example:
        >>> Path("data.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
        33
        >>> rows = open_rows(Path("data.jsonl"))
        >>> len(rows), rows[1]
        (2, {'text': 'two'})
    """
    check_there(file, "data file", RULE)
    ending = ending_of(file)
    if is_compressed(file) or ending in TABLES or ending in COLUMNAR and ending != ".parquet":
        kind = file.suffix.lower()
        raise ValueError(f"{file} is a {kind} file. {RULE} Write it as one of these, or leave --streaming out.")
    return ParquetRows(file) if ending == ".parquet" else JsonLines(file)


class JsonLines:
    """The lines of a JSONL file.

    Args:
        file: The file.

    Raises:
        ValueError: If it is empty, or a JSON list.
    """

    blocks = None

    def __init__(self, file: Path) -> None:
        self.file = file
        with open(file, "rb") as stream:
            self._version = _version(stream.fileno())
            self.starts, self.ends = _lines(stream)
        if not len(self):
            raise ValueError(f"{file} is empty. Give at least one record.")
        if self._bytes(0).lstrip().startswith(b"["):
            raise ValueError(f"{file} is a JSON list, which is read whole. {RULE} Write one object a line.")

    def __len__(self) -> int:
        """Count the lines that are not blank."""
        return len(self.starts)

    def __getitem__(self, place: int) -> Any:
        """Read a line.

        Raises:
            ValueError: If it is not JSON, or the file has changed.
        """
        where = f"{self.file} is not JSON in record {place + 1}, at byte {self.starts[place]}"
        try:
            return parse_json(self._bytes(place).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: it is not UTF-8 text.") from error
        except JSONError as error:
            raise ValueError(f"{where}: {error.reason}. Give one JSON object a line.") from error

    def _bytes(self, place: int) -> bytes:
        start, end = int(self.starts[place]), int(self.ends[place])
        with open(self.file, "rb") as stream:
            if _version(stream.fileno()) != self._version:
                raise ValueError(f"{self.file} was changed while it was read. Start again.")
            stream.seek(start)
            return stream.read(end - start)


def _lines(stream: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Where lines that are not blank start and end, line breaks not included."""
    breaks = [np.array([-1])]
    size = 0
    while piece := stream.read(PIECE):
        breaks.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + size)
        size += len(piece)
    places = np.concatenate([*breaks, [size]])
    starts, ends = places[:-1] + 1, places[1:]
    stream.seek(0)
    if stream.read(len(BOM)) == BOM:
        starts[0] = len(BOM)
    is_blank = ends <= starts
    for place in np.flatnonzero(ends - starts < SHORT):
        stream.seek(int(starts[place]))
        is_blank[place] = not stream.read(max(0, int(ends[place] - starts[place]))).strip()
    return starts[~is_blank], ends[~is_blank]


class ParquetRows:
    """The rows of a Parquet file.

    Args:
        file: The file.

    Raises:
        ValueError: If it is empty or damaged, or pyarrow is not installed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._arrow = import_arrow(file)
        self._lock = threading.Lock()
        try:
            self._parquet = importlib.import_module("pyarrow.parquet").ParquetFile(str(file))
        except (self._arrow.ArrowException, OSError) as error:
            raise damaged(file, error) from error
        check_columns(self._parquet.schema_arrow.names, file)
        metadata = self._parquet.metadata
        self.blocks = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._firsts = np.cumsum([0, *self.blocks])
        self._version = _version(file)
        self._read: dict[int, Any] = {}
        if not len(self):
            raise ValueError(f"{file} is empty. Give at least one record.")

    def __len__(self) -> int:
        """Count the rows."""
        return int(self._firsts[-1])

    def __getitem__(self, place: int) -> Any:
        """Read a row.

        Raises:
            ValueError: If its group is damaged, or the file has changed.
        """
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        with self._lock:
            table = self._group(number)
        [row] = table.slice(place - int(self._firsts[number]), 1).to_pylist()
        return row

    def _group(self, number: int) -> Any:
        if number not in self._read:
            if _version(self.file) != self._version:
                raise ValueError(f"{self.file} was changed while it was read. Start again.")
            while len(self._read) >= GROUPS:
                del self._read[next(iter(self._read))]
            try:
                self._read[number] = self._parquet.read_row_group(number)
            except (self._arrow.ArrowException, OSError) as error:
                raise damaged(self.file, error) from error
        return self._read[number]


class JoinedRows:
    """The rows of several files, one file after the other.

    Args:
        files: The files.
    """

    def __init__(self, files: Sequence[RowFile]) -> None:
        self.files = files
        self.firsts = np.cumsum([0, *(len(file) for file in files)])
        self.blocks: list[int] | None = None
        if any(file.blocks is not None for file in files):
            self.blocks = []
            for file in files:
                self.blocks += [len(file)] if file.blocks is None else file.blocks

    def __len__(self) -> int:
        """Count the rows."""
        return int(self.firsts[-1])

    def file_of(self, place: int) -> tuple[int, int]:
        """The number of a row's file, and the row's place in it."""
        number = int(np.searchsorted(self.firsts, place, side="right")) - 1
        return number, place - int(self.firsts[number])

    def __getitem__(self, place: int) -> Any:
        """Read a row."""
        number, inner = self.file_of(place)
        return self.files[number][inner]


def _version(file: int | Path) -> tuple[int, int]:
    """Size and time of the last change, which a changed content does not keep."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
