"""The micro batches that the examples of one batch are laid into, so that little of what is computed is padding."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core.selecting import picked

STEP = 32  # the smallest width; widths are its multiples
FEWEST = 128  # tokens of a micro batch below which it is not made smaller
TRIED = 2048  # examples that are drawn in batches to compare numbers of rows; fewer would leave it to chance
WORTHWHILE = 0.95  # fewer rows are taken if they cost at most this part
# Times the hidden size: the width of a row at which attention takes as long as all else. As measured on a CPU with the
# hidden size 384, where a step of rows of 512 tokens took 1.23 times that of rows of 128, token by token.
ATTENTION = 4
CALL = 128  # tokens that are computed in the time that a micro batch takes beside its own; chosen, not measured
OCTAVE = 2  # widths from each power of two up to the next; each width that occurs is compiled


class MicroRows(NamedTuple):
    """A micro batch by the numbers of its examples.

    Attributes:
        width: Tokens of a row, padding included.
        rows: The examples of each row, in the order in which they stand there.
    """

    width: int
    rows: list[list[int]]


class MicroLayout(NamedTuple):
    """How the examples of a batch become micro batches.

    Attributes:
        rows: Rows of each micro batch.
        widths: The tokens that a row may have, ascending; the last one holds every example.
        packed: Whether a row may hold several examples.
        rows_by_width: Fewer rows for each of the widths, so that a program has one number of them; empty for ``rows``.
        attention_width: Tokens of a row at which attention takes as long as all else. A token of a wide row costs more.
    """

    rows: int
    widths: Sequence[int]
    packed: bool
    rows_by_width: Sequence[int] = ()
    attention_width: float = math.inf

    def lay_out(self, lengths: Sequence[int]) -> list[MicroRows]:
        """Deal out examples of these lengths.

        Raises:
            ValueError: If one is longer than the largest width.

        Example:
            >>> MicroLayout(2, (32, 64), packed=True).lay_out([30, 10, 20])
            [MicroRows(width=32, rows=[[0], [2, 1]])]
            >>> MicroLayout(2, (32, 64), packed=False).lay_out([30, 10, 40])
            [MicroRows(width=64, rows=[[2], [0]]), MicroRows(width=32, rows=[[1], []])]
        """
        if max(lengths) > self.widths[-1]:
            raise ValueError(f"an example of {max(lengths)} tokens, in rows of at most {self.widths[-1]}.")
        return self._packed(lengths) if self.packed else self._sorted(lengths)

    def computed(self, batches: Iterable[Sequence[int]]) -> int:
        """Count the tokens that are computed for batches of examples of these lengths, padding included.

        Example:
            >>> MicroLayout(2, (32, 64), packed=True).computed([[30, 10, 20], [40]])
            192
        """
        return sum(self._computed(self.lay_out(lengths)) for lengths in batches)

    def cost(self, batches: Iterable[Sequence[int]]) -> float:
        """Estimate the time that batches of examples of these lengths take; a token of a narrow row takes 1.

        Example:
            >>> MicroLayout(2, (32, 64), packed=True, attention_width=64).cost([[30, 10, 20]])
            224.0
        """
        return sum(self._cost(one) for lengths in batches for one in self.lay_out(lengths))

    def __str__(self) -> str:
        """Describe it as a run reports it."""
        examples = ", several examples in each" if self.packed else ""
        at_once = f"up to {max(self.rows_by_width)}" if self.rows_by_width else str(self.rows)
        return f"Rows of {self.widths[0]} to {self.widths[-1]} tokens, {at_once} at once{examples}"

    def _sorted(self, lengths: Sequence[int]) -> list[MicroRows]:
        """One example a row, the longest first."""
        order = _longest_first(lengths)
        micro_batches = []
        while order:
            width = self._width(lengths[order[0]])
            count = self._rows_of(width)
            rows: list[list[int]] = [[number] for number in order[:count]]
            while len(rows) < count:
                rows.append([])
            micro_batches.append(MicroRows(width, rows))
            order = order[count:]
        return micro_batches

    def _rows_of(self, width: int) -> int:
        return self.rows_by_width[self.widths.index(width)] if self.rows_by_width else self.rows

    def _packed(self, lengths: Sequence[int]) -> list[MicroRows]:
        """Several examples a row: each micro batch has the width at which what is left costs the least a real token."""
        left = _longest_first(lengths)
        micro_batches = []
        while left:
            best, least = MicroRows(0, []), math.inf
            narrowest = bisect.bisect_left(self.widths, lengths[left[0]])
            for width in self.widths[narrowest:]:
                rows = _best_fit(lengths, left, self.rows, width)
                placed = [number for row in rows for number in row]
                cost = self._cost(MicroRows(width, rows)) / sum(picked(lengths, placed))
                if cost < least:
                    best, least = MicroRows(width, rows), cost
                if len(placed) == len(left):
                    break
            micro_batches.append(best)
            done = {number for row in best.rows for number in row}
            left = [number for number in left if number not in done]
        return micro_batches

    def _width(self, tokens: int) -> int:
        return self.widths[bisect.bisect_left(self.widths, tokens)]

    def _cost(self, micro_batch: MicroRows) -> float:
        tokens = len(micro_batch.rows) * micro_batch.width
        return CALL + tokens * (1 + micro_batch.width / self.attention_width)

    def _computed(self, micro_batches: Sequence[MicroRows]) -> int:
        return sum(len(one.rows) * one.width for one in micro_batches)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))


def _best_fit(lengths: Sequence[int], left: Sequence[int], rows: int, width: int) -> list[list[int]]:
    """Put each example into the row in which it leaves the least room, if there is one (Johnson, 1974)."""
    found: list[list[int]] = [[] for _ in range(rows)]
    rooms = [(width, row) for row in range(rows)]  # ascending
    for number in left:
        place = bisect.bisect_left(rooms, (lengths[number], 0))
        if place == rows:
            continue
        room, row = rooms.pop(place)
        found[row].append(number)
        bisect.insort(rooms, (room - lengths[number], row))
    return found


def fine_widths(longest: int) -> tuple[int, ...]:
    """Return multiples of 32 up to ``longest``, rounded up: powers of two and what is halfway between them.

    Example:
        >>> fine_widths(300)
        (32, 64, 96, 128, 192, 256, 384)
    """
    widths, width = [], 0
    while width < longest:
        width += max(STEP, 2 ** int(math.log2(max(width, 1))) // OCTAVE)
        widths.append(width)
    return tuple(widths)


def micro_layout(
    lengths: Sequence[int],
    batch_size: int,
    *,
    packed: bool,
    micro_batch_size: int | None = None,
    multiple: int = 1,
    longest: int | None = None,
    hidden_size: float = math.inf,
) -> MicroLayout:
    """Choose the rows and widths of micro batches for a data set.

    Where a row holds one example, a micro batch of some width has no more rows than a batch has examples of that width
    on average: else it would be filled up with shorter ones, and they with padding.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch.
        packed: Whether a row may hold several examples.
        micro_batch_size: Rows that go through the model at once. By default all of a batch; of packed ones, the
            power of two that about holds a batch of average length, a half or a quarter of it, or all of a batch that
            is not much larger: what costs least.
        multiple: The rows are a multiple of this.
        longest: The largest width, such as the model's positions; by default the longest example, rounded up.
        hidden_size: Features of a token in the model: the fewer, the more a wide row costs. By default rows of all
            widths cost the same for a token.

    Example:
        >>> micro_layout([500, 20, 30, 50], 8, packed=True).rows
        2
    """
    rows = micro_batch_size or batch_size
    if packed and micro_batch_size is None:
        # Of a sample of the data it is the same power of two, where a number between may be another.
        rows = 2 ** max(0, round(math.log2(batch_size * np.mean(lengths) / max(lengths))))
        rows = min(rows, batch_size)
    rows = -(-rows // multiple) * multiple
    widths = fine_widths(max(lengths))
    if longest is not None and widths[-1] > longest:
        widths = (*widths[:-1], longest)
    if packed:
        layout = MicroLayout(rows, widths, packed, attention_width=ATTENTION * hidden_size)
        return layout if micro_batch_size else _with_fitting_rows(layout, lengths, batch_size, multiple)
    places = np.searchsorted(widths, lengths)  # each example's width
    expected = np.bincount(places, minlength=len(widths)) * (batch_size / len(lengths))
    counts = [_fewer_rows(rows, *one, multiple) for one in zip(widths, expected.tolist(), strict=True)]
    return MicroLayout(rows, widths, packed, tuple(counts))


def _with_fitting_rows(layout: MicroLayout, lengths: Sequence[int], batch_size: int, multiple: int) -> MicroLayout:
    """The layout with its rows, a half or a quarter of them: what costs least for batches that are drawn.

    A batch that is not much larger may also go through the model whole, as one of examples of one length should.
    """
    counts = {layout.rows, -(-layout.rows // 2), -(-layout.rows // 4)}
    if batch_size < 2 * layout.rows:
        counts.add(batch_size)
    candidates = sorted({-(-count // multiple) * multiple for count in counts}, reverse=True)
    batches = -(-TRIED // batch_size)
    drawn = np.random.default_rng(0).choice(lengths, (batches, batch_size)).tolist()
    best, least = layout, math.inf
    for rows in candidates:
        one = layout._replace(rows=rows)
        cost = one.cost(drawn)
        is_large_enough = rows * layout.widths[-1] >= FEWEST or rows == candidates[0]
        if is_large_enough and cost <= WORTHWHILE * least:
            best, least = one, cost
    return best


def _fewer_rows(rows: int, width: int, expected: float, multiple: int) -> int:
    """Halve rows while they are more than the examples expected; they stay a multiple of ``multiple``."""
    while rows > expected and rows * width > FEWEST and rows // 2 >= multiple and rows // 2 % multiple == 0:
        rows //= 2
    return rows


def filled(fields: Sequence[Mapping[str, Any]], layout: MicroRows) -> list[dict[str, np.ndarray]]:
    """The rows of a micro batch, each of its examples' fields one after the other, with their ``segment_ids``."""
    rows = []
    for numbers in layout.rows:
        if numbers:
            rows.append(_joined(picked(fields, numbers)))
    return rows


def _joined(examples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    counts = [len(example["input_ids"]) for example in examples]
    row = {}
    for name in examples[0]:
        row[name] = np.concatenate([example[name] for example in examples])
    row["segment_ids"] = np.repeat(np.arange(1, len(counts) + 1, dtype=np.int32), counts)
    return row
