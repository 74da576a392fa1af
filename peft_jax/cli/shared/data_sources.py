"""Data of the commands: files and data sets on the hub, their columns, and their shares in a mixture."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.cli.shared.data_options import DataFileOptions
from peft_jax.core.selecting import without
from peft_jax.core.short_errors import short_errors
from peft_jax.train.data.class_names import FIELDS, ClassNames, class_names_of_features
from peft_jax.train.data.data_files import TABLES, ending_of, read_table, with_numbers
from peft_jax.train.data.record_forms import form_of, in_rows, parse_records, said_of_unused
from peft_jax.train.data.records import AnyRecord, Chat, Record

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


@dataclasses.dataclass(frozen=True)
class Source:
    """One --data: the file or the id of a data set, and its share in the mixture, if it is given."""

    name: str
    weight: float | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether it is an id on the hub: one that no file has."""
        return not Path(self.name).exists() and re.fullmatch(HUB_ID, self.name) is not None


class NamedClasses(NamedTuple):
    """The names of the classes that a source's records number; none where it has no names."""

    source: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Records of all sources.

    Attributes:
        records: The records, source by source.
        counts: How many of them each source has.
        weights: The share of each source; None where none is given, and all records are used equally often.
        notes: What is to be said of them.
        classes: The names of the classes that each source's records number.
    """

    records: list[AnyRecord]
    counts: tuple[int, ...]
    weights: tuple[float, ...] | None
    notes: tuple[str, ...]
    classes: tuple[NamedClasses, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the sources that have some, which are the same; none if no source has any."""
        return next((one.names for one in self.classes if one.names), ())

    def source_of(self, record: int) -> int:
        """The position of a record's source."""
        for number, count in enumerate(self.counts):
            if record < count:
                return number
            record -= count
        raise IndexError(record)


def load_records(options: DataFileOptions) -> Loaded:
    """Read the files and data sets.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ValueError: If the records are of no known form, an option does not fit the data, some sources have weights
            and others do not, or two name their classes differently.
    """
    sources = sources_of(options)
    columns = parse_columns(options.columns or ())
    records: list[AnyRecord] = []
    counts, notes = [], []
    classes = []
    for source in sources:
        table, of_columns = _rows(source, options)
        rows = renamed(table, columns, source)
        found = parse_records(rows, source.name)
        classes.append(NamedClasses(source.name, _class_names(rows, of_columns, columns)))
        records += found.records
        counts.append(len(found.records))
        if found.unused:
            notes.append(said_of_unused(source.name, found.unused))
    check_template(options, records)
    _check_same_classes(classes)
    return Loaded(records, tuple(counts), weights_of(sources), tuple(notes), classes=tuple(classes))


def _check_same_classes(classes: Sequence[NamedClasses]) -> None:
    """Raise ValueError if two sources name their classes differently."""
    named = [one for one in classes if one.names]
    for one in named[1:]:
        if one.names != named[0].names:
            raise ValueError(
                f"{named[0].source} numbers the classes {', '.join(named[0].names)}, and {one.source} numbers "
                f"{', '.join(one.names)}. Write both with the same classes."
            )


def _class_names(rows: Sequence[Any], names: ClassNames, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes that rows have, by those of the columns of their file."""
    if not names:
        return ()
    needed = form_of(in_rows(rows)[0], "record 1").needed
    fields = [field for field in FIELDS if field in needed]
    return names.get(columns.get(fields[0], fields[0]), ()) if fields else ()


def check_template(options: DataFileOptions, records: Sequence[AnyRecord]) -> None:
    """Raise ValueError for a --prompt-template of data that has its own layout."""
    kinds = {type(record) for record in records}
    is_own = options.prompt_template == "chat" and Chat in kinds
    if options.prompt_template is not None and Record not in kinds and not is_own:
        raise ValueError("--prompt-template is for instruction data, but this data has its own layout. Leave it out.")


def sources_of(options: DataFileOptions) -> list[Source]:
    """The sources that the options name.

    Raises:
        ValueError: If a weight is no number above 0, or an option is for data sets on the hub and none is named.
    """
    sources = [parse_source(word) for word in options.data]
    for name in ("data_split", "data_subset", "data_revision"):
        if getattr(options, name) is not None and not any(source.is_on_hub for source in sources):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for data sets on the hub, and --data names files. Leave it out.")
    weights_of(sources)
    return sources


def parse_source(word: str) -> Source:
    """The source that a --data names.

    Raises:
        ValueError: If its weight is no number above 0.

    Example:
        >>> parse_source("chats.jsonl@0.3")
        Source(name='chats.jsonl', weight=0.3)
    """
    name, at, text = word.rpartition("@")
    if not at or Path(word).exists():
        return Source(word)
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not weight > 0 or math.isinf(weight) or not name:
        raise ValueError(
            f"--data {word} has the weight '{text}'. Give a number above 0 behind the @, such as data.json@2."
        )
    return Source(name, weight)


def weights_of(sources: Sequence[Source]) -> tuple[float, ...] | None:
    """The shares of the sources in a mixture, or None where there is no mixture.

    Raises:
        ValueError: If some have a weight and others do not.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) < len(sources):
        missing = next(source.name for source in sources if source.weight is None)
        raise ValueError(f"--data {missing} has no weight, and other data has one. Give weights to all, or to none.")
    return tuple(weight / sum(given) for weight in given) if len(given) > 1 else None


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """The column of each field.

    Raises:
        ValueError: If a word is not a field and a column, or a field has two.

    Example:
        >>> parse_columns(["instruction=query", "output=reply"])
        {'instruction': 'query', 'output': 'reply'}
    """
    columns: dict[str, str] = {}
    for word in words:
        field, equals, column = word.partition("=")
        if not (field and equals and column):
            raise ValueError(f"--columns has '{word}'. Give a field and its column, such as instruction=query.")
        if field in columns:
            raise ValueError(
                f"--columns names two columns for {field}: {columns[field]} and {column}. Give one of them."
            )
        columns[field] = column
    return columns


@short_errors()
def renamed(rows: Sequence[Any], columns: Mapping[str, str], source: Source) -> list[Any]:
    """The rows with their columns named as the fields that they hold.

    Raises:
        ValueError: If the first row lacks a column.
    """
    if rows and isinstance(rows[0], dict):
        for field, column in columns.items():
            if column not in rows[0]:
                raise ValueError(
                    f"--columns {field}={column}: {source.name} has no column {column}; it has {', '.join(rows[0])}."
                )
    return [_renamed(row, columns, source) for row in rows]


def _renamed(row: Any, columns: Mapping[str, str], source: Source) -> Any:
    if not isinstance(row, dict):
        return row
    taken = {*columns, *columns.values()}
    found = without(row, taken)
    found |= {field: row[column] for field, column in columns.items() if column in row}
    return with_numbers(found) if ending_of(Path(source.name)) in TABLES else found


def _rows(source: Source, options: DataFileOptions) -> tuple[Sequence[Any], ClassNames]:
    """The rows of a source, and the names of the classes of its columns."""
    if not source.is_on_hub:
        return read_table(Path(source.name))
    rows = from_hub(source.name, options)
    features = getattr(rows, "features", None)
    return rows, {} if features is None else class_names_of_features(features.to_dict())


def from_hub(name: str, options: DataFileOptions) -> Any:
    """The rows of a data set on the hub, which are read from disk when they are asked for.

    Raises:
        FileNotFoundError: If it cannot be read.
        ValueError: If the package is missing.
    """
    said = f"no data file at {name}, and as a dataset on the hub it"
    try:
        import datasets  # an optional dependency
    except ImportError as error:
        raise ValueError(
            f"{said} needs the package datasets. Install it, in a clone: pip install '.[datasets]'"
        ) from error
    subset = [] if options.data_subset is None else [options.data_subset]
    revision = {} if options.data_revision is None else {"revision": options.data_revision}
    split = options.data_split or "train"
    try:
        return datasets.load_dataset(name, *subset, split=split, trust_remote_code=False, **revision)
    except Exception as error:  # of many kinds: no network, no such dataset, a gated one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{said} cannot be read: {reason}. Check the spelling and the network.") from error
