"""Tokenized texts with their labels, for the examples that draw batches at random."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Token ids and mask ``(texts, length)``, and labels ``(texts,)`` or ``(texts, length of answers)``.

    Labels of tokens are -100 on padding.
    """

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def batch(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, ...]:
        """Ids, mask and labels of rows that are drawn at random."""
        rows = rng.choice(len(self.ids), size)
        return self.ids[rows], self.mask[rows], self.labels[rows]
