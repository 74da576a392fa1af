"""The kinds of labels of texts, as transformers' ``problem_type`` names them: one class, several, or numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from peft_jax.models.handles.label_losses import MULTI, REGRESSION, SINGLE
from peft_jax.models.hf_config import numbered_labels
from peft_jax.train.data.records import Label, Labelled

MOST = 2**16  # classes that are named by numbers


def problem_of(records: Sequence[Labelled]) -> str:
    """The kind of labels that records have: floats are a regression's, tuples of names or numbers are several classes.

    Raises:
        ValueError: If records have labels of several kinds.

    Example:
        >>> problem_of([Labelled("Well done.", 4.5), Labelled("Oh no.", 1)])
        'regression'
        >>> problem_of([Labelled("Well done.", ("good", "short"))])
        'multi_label_classification'
    """
    is_list = {isinstance(record.label, tuple) for record in records}
    if len(is_list) == 2:
        raise ValueError("records have one label and lists of labels. Give lists, which may have one or none.")
    labels = _flat(records)
    has_floats = any(isinstance(label, float) for label in labels)
    names = [label for label in labels if isinstance(label, str)]
    if has_floats and names:
        raise ValueError(f"records have labels that are names ({names[0]!r}) and decimal numbers. Give one of them.")
    if has_floats:
        return REGRESSION
    return MULTI if True in is_list else SINGLE


def names_of(records: Sequence[Labelled], problem: str) -> dict[int, str]:
    """The names of the outputs that records are learned with, by number.

    Those of classes are the names in their order, or ``LABEL_0`` and so on for numbers, as of a regression.

    Raises:
        ValueError: If records have names and numbers, there is one class alone where one is to be chosen, or lists of
            numbers of several lengths are to be predicted.

    Example:
        >>> names_of([Labelled("Well done.", ("short", "good")), Labelled("Oh no.", ())], "multi_label_classification")
        {0: 'good', 1: 'short'}
    """
    labels = _flat(records)
    decimals = [label for label in labels if isinstance(label, float)]
    if problem == REGRESSION or (problem == MULTI and decimals):
        return numbered_labels(_outputs(records))
    if decimals:
        raise ValueError(f"a record has the label {decimals[0]}, and classes have names or whole numbers. Give these.")
    texts = sorted({label for label in labels if isinstance(label, str)})
    numbers = [label for label in labels if isinstance(label, int)]
    check_numbers(texts, numbers)
    if not labels:
        raise ValueError("no record has a label. Give records of which some have one.")
    names = dict(enumerate(texts)) or numbered_labels(max(numbers) + 1)
    if problem == SINGLE and len(names) < 2:
        raise ValueError(f"all records have the label {labels[0]!r}. Give records of two classes or more.")
    return names


def check_numbers(names: Sequence[str], numbers: Sequence[int]) -> None:
    """Raise ValueError for labels of which some are names and some numbers, or for numbers that no class has."""
    if names and numbers:
        raise ValueError(f"records have labels that are names ({names[0]!r}) and numbers ({numbers[0]}). Give names.")
    if numbers and not (min(numbers) >= 0 and max(numbers) < MOST):
        wrong = max(numbers) if max(numbers) >= MOST else min(numbers)
        raise ValueError(f"a record has the label {wrong}. Number classes from 0 on, below {MOST}.")


def label_array(label: Label, problem: str, id2label: Mapping[int, str], record: int) -> np.ndarray:
    """A label as the loss takes it: the class () int32, or float32 (outputs,) for several classes and numbers.

    Args:
        label: The label.
        problem: The kind of labels, by transformers' name.
        id2label: Names of the outputs by number, from 0 on.
        record: The number of the record, for errors.

    Raises:
        ValueError: If it is of another kind, names no class, or has another number of values.

    Example:
        >>> label_array(("b",), "multi_label_classification", {0: "a", 1: "b"}, 1).tolist()
        [0.0, 1.0]
        >>> label_array(2.5, "regression", {0: "LABEL_0"}, 1).tolist()
        [2.5]
    """
    each = label if isinstance(label, tuple) else (label,)
    if problem == SINGLE:
        if isinstance(label, tuple | float):
            raise ValueError(
                f"record {record} has the label {_shown(label)}, and the model predicts one class. Give one."
            )
        return np.asarray(_class_of(label, id2label, record), np.int32)
    if problem == REGRESSION:
        return _numbers(each, len(id2label), record)
    if any(isinstance(one, float) for one in each):
        return _marks(each, len(id2label), record)
    classes = [_class_of(one, id2label, record) for one in each]
    if len(set(classes)) < len(classes):
        raise ValueError(
            f"record {record} has the labels {_shown(label)}, which name a class twice. Name each class once; or for "
            "every class write 1.0 or 0.0, with --problem-type multi_label_classification."
        )
    found = np.zeros(len(id2label), np.float32)
    found[classes] = 1
    return found


def _flat(records: Sequence[Labelled]) -> list[str | int | float]:
    labels: list[str | int | float] = []
    for record in records:
        labels += record.label if isinstance(record.label, tuple) else [record.label]
    return labels


def _outputs(records: Sequence[Labelled]) -> int:
    """How many numbers each record has."""
    counts = set[int]()
    for record in records:
        counts.add(len(record.label) if isinstance(record.label, tuple) else 1)
    if len(counts) > 1 or 0 in counts:
        found = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"records have lists of {found} numbers. Give each record as many, one or more.")
    return counts.pop()


def _class_of(label: str | int | float, id2label: Mapping[int, str], record: int) -> int:
    """The number of a class."""
    numbers = {name: number for number, name in id2label.items()}
    found = numbers.get(label, -1) if isinstance(label, str) else label
    if found not in id2label:
        known = ", ".join(id2label.values())
        raise ValueError(f"record {record} has the label {label!r}, and the model's are {known}.")
    return int(found)


def _numbers(each: Sequence[str | int | float], count: int, record: int) -> np.ndarray:
    """The numbers of a regression."""
    names = [one for one in each if isinstance(one, str)]
    if names:
        raise ValueError(f"record {record} has the label {names[0]!r}, and the model predicts numbers. Give a number.")
    if len(each) != count:
        raise ValueError(f"record {record} has {len(each)} numbers, and the model predicts {count}. Give as many.")
    return np.asarray(each, np.float32)


def _marks(each: Sequence[str | int | float], count: int, record: int) -> np.ndarray:
    """A 1 or a 0 for every class."""
    if len(each) != count or not set(each) <= {0, 1}:
        raise ValueError(
            f"record {record} has the labels {_shown(tuple(each))}, and the model has {count} classes. Give 1.0 or 0.0 "
            "for each, or a list of the text's classes."
        )
    return np.asarray(each, np.float32)


def _shown(label: Label) -> str:
    """A label as JSON writes it."""
    return repr(list(label)) if isinstance(label, tuple) else repr(label)
