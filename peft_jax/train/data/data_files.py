"""Files of records: JSON, JSONL, CSV, TSV, Parquet and Arrow, compressed by gzip or not."""

import csv
import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from peft_jax.core.short_errors import short_errors
from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.core.text_files import check_there, read_text
from peft_jax.train.data.class_names import ClassNames, class_names_of_schema
from peft_jax.train.data.record_forms import FORMATS, to_records
from peft_jax.train.data.records import AnyRecord, Record, named

TABLES = {".csv": ",", ".tsv": "\t"}
SEPARATORS = (",", ";", "\t", "|")
COLUMNAR = (".parquet", ".arrow", ".feather")
RULE = f"Give a JSON or JSONL file of records with {FORMATS}."
NUMBERS = ("label", "task_id", "weight")  # fields that are numbers elsewhere, and texts in tables of texts
DECIMAL = r"[+-]?\d+\.\d*([eE][+-]?\d+)?"  # of a regression


def read_data(file: str | Path) -> list[AnyRecord]:
    """Read a file of records in one of the forms of `peft_jax.train.data.record_forms`.

    Args:
        file: A CSV, TSV, Parquet or Arrow file, by its ending, or else a JSON list or one JSON object a line; ``.gz``
            behind the ending for a compressed one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or empty, or its records are of no known form or of several.

    Example:
        >>> Path("data.jsonl").write_text('{"prompt": "1, 2,", "completion": " 3"}')
        39
        >>> read_data("data.jsonl")
        [Completion(prompt='1, 2,', completion=' 3')]
    """
    return to_records(read_rows(Path(file)), str(file))


def read_records(file: str | Path) -> list[Record]:
    """Read a file by `read_data` whose records have alpaca's fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `read_data` does, or if the records are of another format.

    Example:
        >>> Path("data.jsonl").write_text('{"instruction": "Reverse.", "input": "abc", "output": "cba"}')
        60
        >>> read_records("data.jsonl")
        [Record(instruction='Reverse.', input='abc', output='cba')]
    """
    records = []
    for record in read_data(file):
        if not isinstance(record, Record):
            raise ValueError(
                f"the records of {file} have {named(type(record))}, not {named(Record)}. Read them with read_data."
            )
        records.append(record)
    return records


def read_rows(file: Path) -> list[Any]:
    r"""The values in a file: a JSON list's items, one value a line, or the rows of a table as objects.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or empty, or of a format that needs a package which is not installed.

    Example:
        >>> Path("data.csv").write_text("question,answer\n1 + 1?,2\n")
        25
        >>> read_rows(Path("data.csv"))
        [{'question': '1 + 1?', 'answer': '2'}]
    """
    return read_table(file)[0]


@short_errors()
def read_table(file: Path) -> tuple[list[Any], ClassNames]:
    r"""As `read_rows`, with the names that a Parquet or Arrow file has for the classes of its columns.

    Raises:
        FileNotFoundError: As `read_rows` does.
        ValueError: As `read_rows` does.

    Example:
        >>> Path("data.csv").write_text("text,label\nWell done.,1\n")
        24
        >>> read_table(Path("data.csv"))
        ([{'text': 'Well done.', 'label': '1'}], {})
    """
    ending = ending_of(file)
    if ending in COLUMNAR:
        return _read_columnar(file)
    text = _read_text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty. Give at least one record with {FORMATS}.")
    if ending in TABLES:
        return list(_table(text, file, TABLES[ending])), {}
    return _parse(text, file), {}


def ending_of(file: Path) -> str:
    """The ending of a file's name that says its format, without that of its compression.

    Example:
        >>> ending_of(Path("data.csv.gz"))
        '.csv'
    """
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return name.suffix.lower()


def is_compressed(file: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return file.suffix.lower() == ".gz"


def _read_text(file: Path) -> str:
    rule = f"Save the table as UTF-8. {RULE}" if ending_of(file) in TABLES else RULE
    if not is_compressed(file):
        return read_text(file, "data file", rule)
    try:
        return _unpacked(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text. {rule}") from error


def _unpacked(file: Path) -> bytes:
    """The content of a compressed file."""
    check_there(file, "data file", RULE)
    try:
        with gzip.open(file) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}). Compress it again.") from error


def _parse(text: str, file: Path) -> list[Any]:
    hint = "Give a JSON list of objects, or one JSON object a line."
    if text.lstrip().startswith("["):
        try:
            return list(parse_json(text))
        except JSONError as error:
            raise ValueError(f"{file} is not JSON: {error}. {hint}") from error
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(parse_json(line))
            except JSONError as error:
                raise ValueError(f"{file} is not JSON in line {number}: {error.reason}. {hint}") from error
    return values


def _table(text: str, file: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """The rows of a table whose first line names the columns; empty cells are left out."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader)
        check_columns(names, file)
        for row in reader:
            if len(row) not in (0, len(names)):
                raise ValueError(
                    f"{file} has {len(row)} cells in line {reader.line_num} and {len(names)} columns "
                    f"({', '.join(names)}). Put cells that hold separators or line breaks in double quotes."
                )
            if row:
                yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{file} is no table in line {reader.line_num}: {error}. Write it with a CSV writer."
        ) from error


def check_columns(names: Sequence[str], file: Path) -> None:
    """Raise ValueError for two columns of one name, and for a first line of a table that has another separator."""
    for number, name in enumerate(names):
        if name and name in names[:number]:  # one without a name is used by no record
            raise ValueError(f"{file} has two columns named '{name}'. Rename or remove one of them.")
    ending = ending_of(file)
    if ending in TABLES and len(names) == 1 and any(mark in names[0] for mark in SEPARATORS):
        separator = {",": "commas", "\t": "tabs"}[TABLES[ending]]
        raise ValueError(
            f"{file} has one column, {names[0]!r}. In a file that ends in {ending} {separator} separate columns."
        )


def with_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table of texts, whose fields of numbers are numbers.

    Example:
        >>> with_numbers({"text": "12", "label": "3"})
        {'text': '12', 'label': 3}
    """
    changed: dict[str, int | float] = {}
    for name in NUMBERS:
        text = row.get(name)
        if isinstance(text, str) and text.strip().removeprefix("-").isdecimal():
            changed[name] = int(text)
        elif name == "label" and isinstance(text, str) and re.fullmatch(DECIMAL, text.strip()):
            changed[name] = float(text)
    return {**row, **changed}


def _read_columnar(file: Path) -> tuple[list[dict[str, Any]], ClassNames]:
    arrow = import_arrow(file)
    check_there(file, "data file", RULE)
    try:
        source = arrow.BufferReader(_unpacked(file)) if is_compressed(file) else arrow.memory_map(str(file))
        if ending_of(file) == ".parquet":
            parquet = importlib.import_module("pyarrow.parquet").ParquetFile(source)
            check_columns(parquet.schema_arrow.names, file)
            table = parquet.read()
        else:
            table = open_arrow(arrow, source).read_all()
            check_columns(table.column_names, file)
        rows = table.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise damaged(file, error) from error
    return rows, class_names_of_schema(table.schema.metadata, str(file))


def damaged(file: Path, error: Exception) -> ValueError:
    """The error of a Parquet or Arrow file that cannot be read."""
    reason = " ".join(str(error).split())
    return ValueError(f"{file} is not a whole {ending_of(file)[1:]} file ({reason}). Write it again.")


def open_arrow(arrow: ModuleType, source: Any) -> Any:
    """Open an Arrow file, in the format of files or in that of streams, in which data sets are saved."""
    try:
        return arrow.ipc.open_file(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        return arrow.ipc.open_stream(source)


def import_arrow(file: Path) -> ModuleType:
    """The package that reads Parquet and Arrow.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ValueError(f"{file} needs the package pyarrow. Install it, in a clone: pip install '.[arrow]'") from error
