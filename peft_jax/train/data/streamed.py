"""Rows that are read from files and encoded when a batch needs them, so that data may be larger than memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from peft_jax.train.data.batches import fixed_lengths
from peft_jax.train.data.long_examples import Example, NothingFits
from peft_jax.train.data.row_files import GROUPS

AHEAD = 4  # batches that are read while a step is computed


class Streamed:
    """Examples that are read one at a time.

    Args:
        read: Reads and encodes the row at a place.
        places: The places of the rows, ascending.
        blocks: Rows of each part of the files that is read at once, all places included; None if single rows are.
        longest: The most tokens of an example.
        pad: The token id that fills rows up.

    Example:
        >>> ids = np.arange(3)
        >>> data = Streamed(lambda place: Example(ids + place, ids), np.array([1, 5]), None, longest=64)
        >>> len(data), data[1]["input_ids"].tolist()
        (2, [5, 6, 7])
    """

    def __init__(
        self,
        read: Callable[[int], Example],
        places: np.ndarray,
        blocks: Sequence[int] | None,
        longest: int,
        pad: int = 0,
    ) -> None:
        self._read, self._places, self.pad = read, places, pad
        self.lengths = fixed_lengths(longest)
        self.blocks: np.ndarray | None = None
        if blocks is not None:
            bounds = np.searchsorted(places, np.cumsum([0, *blocks]))
            counts = np.diff(bounds)
            self.blocks = counts[counts > 0]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Read a row's fields. A row that is left out gives its turn to the one behind it.

        Raises:
            NothingFits: If all are left out.
        """
        for step in range(len(self)):
            try:
                ids, labels, more = self._read(int(self._places[(index + step) % len(self)]))
            except NothingFits:
                continue
            return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels, **more}
        raise NothingFits(f"none of {len(self)} records fits into {self.lengths[-1]} tokens. Raise cutoff_len.")


class ShuffledBlocks(grain.MapDataset[Any]):  # type: ignore[misc] # grain ships no types
    """Rows in an order that reads files block by block.

    In each epoch the blocks are shuffled, and the rows of four of them at a time. The order is that of a seed, and item
    ``n`` is the same each time it is asked for.

    Args:
        parent: The rows.
        blocks: Rows of each block.
        seed: Seed of the order.

    Example:
        >>> rows = ShuffledBlocks(grain.MapDataset.source(range(6)), [1, 1, 1, 1, 2], seed=0)
        >>> sorted(rows[n] for n in range(6)), sorted(rows[n] for n in range(6, 12))
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, parent: grain.MapDataset[Any], blocks: Sequence[int] | np.ndarray, *, seed: int) -> None:
        super().__init__(parent)
        self._sizes = np.asarray(blocks)
        self._firsts = np.cumsum([0, *blocks])[:-1]
        self._of_seed = seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None  # number, blocks in order, ends of pools
        self._pool: tuple[int, int, np.ndarray] | None = None  # epoch, number, places in order

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._parent)

    def __str__(self) -> str:
        """Name it, as grain's transformations are named."""
        return "ShuffledBlocks"

    def __getitem__(self, index: Any) -> Any:
        """Return item ``index``, which counts on through epochs."""
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        order, ends = self._order(epoch)
        pool = int(np.searchsorted(ends, place, side="right"))
        places = self._places(epoch, pool, order)
        first = int(ends[pool - 1]) if pool else 0
        return self._parent[int(places[place - first])]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and the number of rows up to the end of each pool of blocks."""
        known = self._epoch  # read once: threads that read ahead may set another
        if known is None or known[0] != epoch:
            order = np.random.default_rng((self._of_seed, epoch)).permutation(len(self._sizes))
            starts = np.arange(0, len(order), GROUPS)
            known = (epoch, order, np.cumsum(np.add.reduceat(self._sizes[order], starts)))
            self._epoch = known
        return known[1:]

    def _places(self, epoch: int, pool: int, order: np.ndarray) -> np.ndarray:
        """The places of a pool's rows, in order."""
        known = self._pool
        if known is None or known[:2] != (epoch, pool):
            parts = []
            for block in order[pool * GROUPS : (pool + 1) * GROUPS]:
                parts.append(np.arange(self._firsts[block], self._firsts[block] + self._sizes[block]))
            dice = np.random.default_rng((self._of_seed, epoch, pool))
            known = (epoch, pool, dice.permutation(np.concatenate(parts)))
            self._pool = known
        return known[2]


class ReadAhead(Sequence[Any]):
    """Batches of which a thread of grain reads the next ones while one is used.

    Args:
        batches: From `peft_jax.train.training_batches`, of rows that are read from files.

    Example:
        >>> ahead = ReadAhead(grain.MapDataset.range(5).repeat())
        >>> [ahead[n] for n in (3, 4, 5, 0)]
        [3, 4, 0, 0]
    """

    def __init__(self, batches: grain.MapDataset[Any]) -> None:
        self._batches = batches
        self._next = 0
        self._last: Any = None  # the batch before the next one
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        """Return a batch; the last one again and the next one are at hand already."""
        if self._iterator is not None and index == self._next - 1:
            return self._last
        if self._iterator is None or index != self._next:
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
            self._iterator = iter(self._batches[index:].to_iter_dataset(options))
        self._next = index + 1
        self._last = next(self._iterator)
        return self._last
