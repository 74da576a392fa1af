"""Classes that a data file numbers and names, and a model numbers and names otherwise."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from peft_jax.cli.shared.data_sources import Loaded, NamedClasses
from peft_jax.models.hf_config import numbered_labels
from peft_jax.train.data.records import AnyRecord, Labelled, Tagged

Value = TypeVar("Value", bound=str | int | float)


def by_names_of(loaded: Loaded, known: Mapping[int, str]) -> Loaded:
    """The records with names in place of the numbers of their classes, where their file numbers these otherwise.

    Where the model's classes have numbers alone, or names of which the file has none, numbers are the model's; a note
    says so in the second case, and in the first one if the file names more or fewer classes.

    Args:
        loaded: The records, and the names of their classes.
        known: The names of the model's classes, by number.

    Raises:
        ValueError: If a record has a number that its file has no name for.

    Example:
        >>> classes = NamedClasses("a.parquet", ("good", "bad"))
        >>> loaded = Loaded([Labelled("Well done.", 0)], (1,), None, (), classes=(classes,))
        >>> by_names_of(loaded, {0: "bad", 1: "good"}).records
        [Labelled(text='Well done.', label='good', text_pair='')]
    """
    names, others = loaded.class_names, tuple(known.values())
    is_numbered = dict(known) == numbered_labels(len(known))
    if is_numbered and names and len(names) != len(others):
        note = f"The data names {len(names)} classes, and there are {len(others)}: its names are not used."
        return dataclasses.replace(loaded, notes=(*loaded.notes, note))
    if not names or is_numbered or names == others:
        return loaded
    if not set(names) & set(others):
        note = f"The data has the classes {', '.join(names)}, and the model {', '.join(others)}: taken by number."
        return dataclasses.replace(loaded, notes=(*loaded.notes, note))
    records: list[AnyRecord] = []
    for classes, count in zip(loaded.classes, loaded.counts, strict=True):
        own = loaded.records[len(records) : len(records) + count]
        records += [_named(record, classes, number) for number, record in enumerate(own, 1)] if classes.names else own
    return dataclasses.replace(loaded, records=records)


def _named(record: AnyRecord, classes: NamedClasses, number: int) -> AnyRecord:
    if isinstance(record, Tagged):
        return dataclasses.replace(record, tags=tuple(_name(tag, classes, number) for tag in record.tags))
    if not isinstance(record, Labelled):
        return record
    if isinstance(record.label, tuple):
        return dataclasses.replace(record, label=tuple(_name(label, classes, number) for label in record.label))
    return dataclasses.replace(record, label=_name(record.label, classes, number))


def _name(label: Value, classes: NamedClasses, record: int) -> Value | str:
    """The name of a class that has a number; what is no number stays."""
    if not isinstance(label, int):
        return label
    if not 0 <= label < len(classes.names):
        raise ValueError(
            f"record {record} of {classes.source} has the label {label}, and that file names {len(classes.names)} "
            f"classes ({', '.join(classes.names)}). Remove the record, or write the file with the name of its class."
        )
    return classes.names[label]
