"""Scores of an evaluation beside the loss: correlations and F1, from a model's guesses and the labels."""

from collections.abc import Mapping, Sequence

import numpy as np

Guesses = Sequence[Mapping[str, np.ndarray]]  # of each batch its fields, and the model's guesses as `guesses`


def correlations(batches: Guesses) -> dict[str, float]:
    """Pearson's and Spearman's correlations of numbers (rows, outputs), their means over the outputs.

    They are NaN where predictions or labels do not differ.

    Example:
        >>> batch = {"guesses": np.array([[1.0], [2.0], [4.0]]), "labels": np.array([[1.0], [3.0], [2.0]])}
        >>> {name: round(value, 4) for name, value in correlations([batch]).items()}
        {'pearson': 0.3273, 'spearman': 0.5}
    """
    guesses, labels = _rows_with_labels(batches)
    pearson, spearman = [], []
    for guess, label in zip(guesses.T, labels.T, strict=True):
        pearson.append(_pearson(guess, label))
        spearman.append(_pearson(_ranks(guess), _ranks(label)))
    return {"pearson": float(np.mean(pearson)), "spearman": float(np.mean(spearman))}


def several_classes(batches: Guesses) -> dict[str, float]:
    """F1 over all classes of all texts, the mean of the classes' F1, and the share of texts with all classes right.

    A class is guessed where its logit (rows, classes) is above 0, a probability above a half. As in scikit-learn, the
    F1 of a class that is neither guessed nor there is 0.

    Example:
        >>> batch = {"guesses": np.array([[2.0, -1.0], [1.0, 1.0]]), "labels": np.array([[1.0, 0.0], [0.0, 1.0]])}
        >>> {name: round(value, 4) for name, value in several_classes([batch]).items()}
        {'f1': 0.8, 'f1_macro': 0.8333, 'exact_match': 0.5}
    """
    logits, labels = _rows_with_labels(batches)
    guessed, there = logits > 0, labels > 0.5
    right = np.sum(guessed & there, axis=0)
    asked = np.sum(guessed, axis=0) + np.sum(there, axis=0)
    return {
        "f1": ratio(2 * right.sum(), asked.sum()),
        "f1_macro": float(np.mean([ratio(2 * one, both) for one, both in zip(right, asked, strict=True)])),
        "exact_match": float(np.mean(np.all(guessed == there, axis=1))),
    }


def ratio(part: float, whole: float) -> float:
    """Their quotient, and 0 where both are 0."""
    return float(part / whole) if whole else 0.0


def _rows_with_labels(batches: Guesses) -> tuple[np.ndarray, np.ndarray]:
    """Guesses and labels of all rows that have any, in float64."""
    guesses = np.concatenate([batch["guesses"] for batch in batches]).astype(np.float64)
    labels = np.concatenate([batch["labels"] for batch in batches]).astype(np.float64)
    asked = ~np.isnan(labels[:, 0])
    return guesses[asked], labels[asked]


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt(np.sum(one**2) * np.sum(other**2))
    return float(np.sum(one * other) / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value from 0 on; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[places]
