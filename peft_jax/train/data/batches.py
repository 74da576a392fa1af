"""Batches of a few fixed lengths, so that each length is compiled once: by padding, or by packing texts into rows."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, overload

import numpy as np

from peft_jax.core.selecting import picked
from peft_jax.train.data.encode import IGNORE, Example
from peft_jax.train.data.long_examples import has_numbers
from peft_jax.train.data.micro_layout import MicroLayout, filled

SHORTEST = 32
NEAR = 64  # rows of evaluation that are laid out together, in micro batches


class Batch(TypedDict):
    """Rows, each field int32 of shape (batch, length).

    attention_mask is 0 on padding, labels are `IGNORE` where nothing is trained. Packed rows have segment_ids: the
    number of each token's text, from 1 on, and 0 on padding. Where a prompt has several tasks, task_ids (batch,) names
    each row's; where it knows types of tokens, input_type_mask names each token's. For classes of texts, labels are
    (batch,), and token_type_ids distinguish two texts of one row; for several classes and for numbers, labels are
    float32 (batch, outputs), and NaN where a row has none. For an encoder-decoder, labels and decoder_input_ids are
    (batch, length of the decoder). Of spans, labels and ends (batch,) are the places of the first and the last token,
    and windows (batch,) number the rows.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    segment_ids: NotRequired[np.ndarray]
    task_ids: NotRequired[np.ndarray]
    input_type_mask: NotRequired[np.ndarray]
    decoder_input_ids: NotRequired[np.ndarray]
    token_type_ids: NotRequired[np.ndarray]
    ends: NotRequired[np.ndarray]
    windows: NotRequired[np.ndarray]


class Data(Protocol):
    """Rows (the fields of `Batch`, without the batch axis) to batch, and the lengths that batches may have."""

    @property
    def lengths(self) -> Sequence[int]:
        """Ascending; the last one holds every row."""

    @property
    def pad(self) -> int:
        """The token id that fills rows up."""

    def __len__(self) -> int:
        """Count the rows."""

    def __getitem__(self, index: int) -> Any:
        """Return one row."""


class Padded:
    """Examples, one a row. Their batches have lengths 32, 64, 128 and so on, the last one cut to ``longest``.

    Args:
        examples: From `peft_jax.train.data.encode`.
        longest: The largest length; by default that of the longest example, rounded up to a multiple of 32.
        pad: The token id that fills rows up, for models that recognize padding by it.
        shortest: The smallest length. With ``longest`` the same, all batches have this one length.

    Example:
        >>> example = Example(np.array([5, 6, 7]), np.array([-100, 6, 7]))
        >>> Padded([example] * 3).lengths
        (32,)
        >>> Padded([example] * 3, longest=96, shortest=96).lengths
        (96,)
    """

    def __init__(
        self, examples: Sequence[Example], longest: int | None = None, pad: int = 0, *, shortest: int = SHORTEST
    ) -> None:
        self.examples, self.pad = examples, pad
        last = max(shortest, rounded_up(max(example.length for example in examples)))
        if longest is not None:
            last = min(last, longest)
        self.lengths = fixed_lengths(last, shortest)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return an example's fields."""
        ids, labels, more = self.examples[index]
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, **more}


class Packed:
    """Rows of one length, each filled with as many examples as fit; none is cut.

    Each example goes into the first row with enough free positions, in the order given.

    Args:
        examples: From `peft_jax.train.data.encode`, none longer than ``length``.
        length: Tokens of a row.

    Example:
        >>> example = Example(np.array([5, 6, 7]), np.array([-100, 6, 7]))
        >>> [row["segment_ids"].tolist() for row in Packed([example] * 3, 8)]
        [[1, 1, 1, 2, 2, 2], [1, 1, 1]]
    """

    pad = 0

    def __init__(self, examples: Sequence[Example], length: int) -> None:
        self.lengths = (length,)
        self.rows: list[list[Example]] = []
        free = np.zeros(len(examples), np.int64)
        for example in examples:
            fits = np.flatnonzero(free[: len(self.rows)] >= len(example.input_ids))
            if len(fits) == 0:
                free[len(self.rows)] = length
                self.rows.append([])
            row = fits[0] if len(fits) else len(self.rows) - 1
            self.rows[row].append(example)
            free[row] -= len(example.input_ids)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return a row's fields."""
        row = self.rows[index]
        ids = np.concatenate([example.input_ids for example in row])
        numbers = np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), [len(example.input_ids) for example in row])
        labels = np.concatenate([example.labels for example in row])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, "segment_ids": numbers}


class Mixture:
    """Rows of several sources, of which each has its share of the rows that are drawn.

    `training_batches` draws them in turn by these shares. Of a source whose share is larger than its part of the rows,
    rows come more than once in an epoch, each as often as the others of it or once more.

    Args:
        parts: The rows of each source.
        weights: The share of each.

    Example:
        >>> example = Example(np.array([5, 6, 7]), np.array([-100, 6, 7]))
        >>> mixture = Mixture([Padded([example] * 2), Padded([example] * 6)], (0.5, 0.5))
        >>> len(mixture), mixture.lengths
        (8, (32,))
    """

    def __init__(self, parts: Sequence[Data], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights
        self.lengths = max((part.lengths for part in parts), key=lambda lengths: lengths[-1])
        self.pad = parts[0].pad

    def __len__(self) -> int:
        """Count the rows."""
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Any:
        """Return a row; those of the first source are the first ones."""
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def rounded_up(length: int) -> int:
    """Return the next multiple of 32."""
    return -(-length // SHORTEST) * SHORTEST


def fixed_lengths(longest: int, shortest: int = SHORTEST) -> tuple[int, ...]:
    """Return 32, 64, 128, ... up to ``longest``, which is the last one; ``shortest`` replaces the 32.

    Raises:
        ValueError: If ``shortest`` is no length.

    Example:
        >>> fixed_lengths(96)
        (32, 64, 96)
        >>> fixed_lengths(96, 96)
        (96,)
    """
    if shortest < 1:
        raise ValueError(f"the smallest length of batches is {shortest}. Give 1 or more.")
    lengths = []
    length = shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def collate(rows: Sequence[Any], batch_size: int, lengths: Sequence[int], pad: int = 0) -> Batch:
    """Stack rows, each field padded to the shortest of the lengths that holds it; missing rows have no label."""
    fill = {"labels": IGNORE, "ends": IGNORE, "windows": IGNORE, "input_ids": pad, "decoder_input_ids": pad}
    batch = {}
    for name, first in rows[0].items():
        first, column = np.asarray(first), [row[name] for row in rows]
        if name == "labels" and has_numbers(first):
            batch[name] = np.full((batch_size, len(first)), np.nan, np.float32)
            batch[name][: len(rows)] = column
            continue
        if np.ndim(first) == 0:  # one number a row, such as a class
            batch[name] = np.full((batch_size,), fill.get(name, 0), np.int32)
            batch[name][: len(rows)] = column
            continue
        longest = max(map(np.size, column))
        width = next(length for length in lengths if length >= longest)
        batch[name] = np.full((batch_size, width), fill.get(name, 0), np.int32)
        for number, values in enumerate(column):
            batch[name][number, : len(values)] = values
    return Batch(**batch)  # type: ignore[typeddict-item]


def micro_batches(rows: Sequence[Any], layout: MicroLayout, pad: int = 0) -> list[Batch]:
    """Lay the rows of one batch into micro batches, each of its own length.

    Args:
        rows: The fields of `Batch` of each row, without the batch axis.
        layout: From `peft_jax.train.data.micro_layout.micro_layout`.
        pad: The token id that fills rows up.

    Example:
        >>> fields = Padded([Example(np.array([5, 6, 7]), np.array([-100, 6, 7]))] * 3)
        >>> [batch] = micro_batches(list(fields), MicroLayout(1, (32,), packed=True))
        >>> batch["segment_ids"][0, :10].tolist()
        [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]
    """
    found = []
    for chosen in layout.lay_out(list(map(longest_field, rows))):
        if layout.packed:
            fields = filled(rows, chosen)
        else:
            fields = list(picked(rows, itertools.chain(*chosen.rows)))
        found.append(collate(fields, len(chosen.rows), layout.widths, pad))
    return found


def longest_field(row: Mapping[str, Any]) -> int:
    """Count the tokens of a row's longest field."""
    return max(np.size(field) for field in row.values() if not has_numbers(field))


@overload
def training_batches(data: Data, batch_size: int, *, seed: int) -> Sequence[Batch]: ...
@overload
def training_batches(data: Data, batch_size: int, *, seed: int, layout: MicroLayout) -> Sequence[Sequence[Batch]]: ...
def training_batches(
    data: Data, batch_size: int, *, seed: int, layout: MicroLayout | None = None
) -> Sequence[Batch] | Sequence[Sequence[Batch]]:
    """Lay out an endless run: item ``n`` is the batch of step ``n``, the same each time it is asked for.

    Every epoch is shuffled anew and holds every row once; its last batch is filled up with rows that have no label. Of
    a `Mixture` each source is shuffled and repeated by itself.

    Args:
        data: The rows.
        batch_size: Rows of a batch.
        seed: Seed of the order.
        layout: Gives each batch as micro batches, for `peft_jax.train.make_accumulating_step`. The rows of a batch do
            not depend on it.
    """
    import grain  # not at the top: a training step is compiled and run without it

    lengths, pad = data.lengths, data.pad

    def stack(rows: Sequence[Any]) -> Any:
        return collate(rows, batch_size, lengths, pad) if layout is None else micro_batches(rows, layout, pad)

    if isinstance(data, Mixture):
        parts = []
        for number, part in enumerate(data.parts):
            parts.append(_shuffled(part, seed + number).repeat())
        mixed = grain.MapDataset.mix(parts, data.weights)
        return mixed.batch(batch_size, drop_remainder=True, batch_fn=stack)
    return _shuffled(data, seed).batch(batch_size, drop_remainder=False, batch_fn=stack).repeat()


def _shuffled(data: Data, seed: int) -> Any:
    """The rows in the order of a seed, another one in each epoch."""
    import grain

    rows = grain.MapDataset.source(data)
    blocks = getattr(data, "blocks", None)
    if blocks is None:
        return rows.seed(seed).shuffle()
    from peft_jax.train.data.streamed import ShuffledBlocks  # which imports grain

    return ShuffledBlocks(rows, blocks, seed=seed)


def steps_per_epoch(data: Data, batch_size: int) -> int:
    """Count the batches of an epoch, the last one included that may not be full."""
    return -(-len(data) // batch_size)


def evaluation_batches(data: Data, batch_size: int, layout: MicroLayout | None = None) -> Iterator[Batch]:
    """Yield every row once, in order; the last batch is filled up with rows that have no label.

    With a layout they are micro batches, each of its own length, and rows that are near each other change places.
    """
    together = batch_size if layout is None else NEAR * layout.rows
    for start in range(0, len(data), together):
        rows = [data[index] for index in range(start, min(start + together, len(data)))]
        if layout is None:
            yield collate(rows, batch_size, data.lengths, data.pad)
        else:
            yield from micro_batches(rows, layout, data.pad)
