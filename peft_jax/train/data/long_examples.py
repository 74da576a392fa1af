"""Examples of more tokens than a row may have: cut, left out, or split into several."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

IGNORE = -100

Long = Literal["truncate", "drop", "split"]


def has_numbers(labels: npt.ArrayLike) -> bool:
    """Whether labels are a number for each output of the model, not one for each token.

    Example:
        >>> has_numbers(np.zeros(3, np.float32)), has_numbers(np.zeros(3, np.int32))
        (True, False)
    """
    return np.asarray(labels).dtype.kind == "f"


class NothingFits(ValueError):
    """No example fits into a row, with something in it that is learned."""


class Example(NamedTuple):
    """One row of a batch to be, all int32 but for labels that are numbers.

    Attributes:
        input_ids: Token ids (length,).
        labels: Of a causal model the same where they are trained and `IGNORE` elsewhere; of an encoder-decoder the
            answer's token ids (its length,); of a classifier of texts the class (), or float32 (outputs,)
            for several classes of a text and for a regression.
        more: The batch's further fields by name, as ``decoder_input_ids``.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    more: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def length(self) -> int:
        """Tokens of the longer one of inputs and labels."""
        return self.input_ids.size if has_numbers(self.labels) else max(self.input_ids.size, self.labels.size)


class Window(NamedTuple):
    """The part of a record's text that an example has.

    Attributes:
        record: The position of the record.
        places: The characters of the text that each token is of, from and to (length, 2); -1 for tokens outside of it.
        null: The place of the token that stands for no answer.
    """

    record: int
    places: np.ndarray
    null: int


def count_labels(examples: Sequence[Example]) -> int:
    """Count the labels that are learned."""
    return sum(int(np.sum(example.labels != IGNORE)) for example in examples)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The examples that fit; ``examples, too_long = encoded`` unpacks the first two.

    Attributes:
        examples: The examples, in the order of their records.
        too_long: How many were left out, because they are longer than a row or, where they are cut, because nothing
            that is learned is in the part that is kept.
        shortened: How many were cut, or split into several.
        records: The position of each example's record.
        windows: Of spans the part of its text that each example has.
    """

    examples: list[Example]
    too_long: int
    shortened: int = 0
    records: tuple[int, ...] = ()
    windows: tuple[Window, ...] = ()

    def __iter__(self) -> Iterator[list[Example] | int]:
        yield self.examples
        yield self.too_long


def kept(examples: Sequence[Example], cutoff_len: int, long: Long = "drop", shortened: int = 0) -> Encoded:
    """Return the examples in rows of at most ``cutoff_len`` tokens.

    Args:
        examples: One for each record.
        cutoff_len: The longest row.
        long: ``drop`` leaves longer ones out; ``truncate`` keeps their beginning; ``split`` makes several rows of one,
            in which each learned token is learned once. The last two are for labels beside the tokens of a causal
            model.
        shortened: How many are cut already.

    Raises:
        NothingFits: A ValueError, if none is left.

    Example:
        >>> ids = np.arange(6, dtype=np.int32)
        >>> for long in ("drop", "truncate", "split"):
        ...     found = kept([Example(ids[:4], ids[:4]), Example(ids, ids)], 4, long)
        ...     print([example.input_ids.tolist() for example in found.examples], found.too_long, found.shortened)
        [[0, 1, 2, 3]] 1 0
        [[0, 1, 2, 3], [0, 1, 2, 3]] 0 1
        [[0, 1, 2, 3], [0, 1, 2, 3], [3, 4, 5]] 0 1
    """
    found: list[Example] = []
    records: list[int] = []
    too_long = 0
    for number, example in enumerate(examples):
        is_too_long = example.length > cutoff_len
        parts = _parts(example, cutoff_len, long) if is_too_long else [example]
        shortened += is_too_long and bool(parts)
        too_long += not parts
        found += parts
        records += [number] * len(parts)
    if not found:
        least = min((_least(example, long) for example in examples), default=0)
        raise NothingFits(
            f"none of {len(examples)} examples fits into {cutoff_len} tokens. Raise cutoff_len to {least} or more."
        )
    return Encoded(found, too_long, shortened, tuple(records))


def check_not_split(long: Long, learner: str) -> None:
    """Raise ValueError for the splitting of examples whose labels are not beside their tokens."""
    if long == "split":
        raise ValueError(f"{learner} learns nothing from parts of an example. Give --long truncate or drop.")


def check_stride(stride: int | None, long: Long) -> None:
    """Raise ValueError for tokens that windows share, where there are no windows or the number is below 0."""
    if stride is None:
        return
    if stride < 0:
        raise ValueError(f"stride is {stride}. Give 0 or a number above.")
    if long == "drop":
        raise ValueError("--long drop leaves out what --stride reads in windows. Give one of them.")


def _parts(example: Example, cutoff_len: int, long: Long) -> list[Example]:
    """The rows of an example that is too long, without those in which nothing is learned."""
    if long == "drop" or example.labels.shape != example.input_ids.shape:
        return []
    if long == "truncate" or cutoff_len < 2:
        starts = [0]
    else:  # the first token of a part is the last one of the part before, which predicts the next one
        starts = list(range(0, example.length - 1, cutoff_len - 1))
    parts = [_part(example, start, start + cutoff_len) for start in starts]
    return [part for part in parts if np.any(part.labels != IGNORE)]


def _part(example: Example, start: int, end: int) -> Example:
    labels = example.labels[start:end].copy()
    if start:
        labels[0] = IGNORE
    more = {}
    for name, value in example.more.items():
        more[name] = value[start:end] if value.shape == example.input_ids.shape else value
    return Example(example.input_ids[start:end], labels, more)


def _least(example: Example, long: Long) -> int:
    """The fewest tokens of a row with which something of an example is kept."""
    learned = np.flatnonzero(np.atleast_1d(example.labels) != IGNORE)
    if long == "drop" or example.labels.shape != example.input_ids.shape or not learned.size:
        return example.length
    return int(learned[0]) + 1
