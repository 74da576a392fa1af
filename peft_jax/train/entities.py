"""Scores of classes of tokens: of single tokens, and of the entities that tags such as B-PER and I-PER mark."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from peft_jax.train.data.encode import IGNORE
from peft_jax.train.scores import Guesses, ratio

MARK = r"[BIES]-.+"  # the tag of a word in an entity


def tag_scores(id2label: Mapping[int, str], batches: Guesses) -> dict[str, float]:
    """Share of right tokens, and F1 with precision and recall: of entities, or if tags mark none the classes' mean F1.

    Args:
        id2label: Names of the tags by number.
        batches: Guesses and labels, each (rows, length); labels are `IGNORE` where there is none.

    Example:
        >>> batch = {"guesses": np.array([[1, 0, 1]]), "labels": np.array([[1, 0, 0]])}
        >>> scores = tag_scores({0: "O", 1: "B-PER"}, [batch])
        >>> {name: round(value, 4) for name, value in scores.items()}
        {'accuracy': 0.6667, 'f1': 0.6667, 'precision': 0.5, 'recall': 1.0}
    """
    guessed, known = [], []
    for batch in batches:
        for guess, labels in zip(batch["guesses"], batch["labels"], strict=True):
            asked = labels != IGNORE
            guessed.append(guess[asked])
            known.append(labels[asked])
    all_guessed, all_known = np.concatenate(guessed), np.concatenate(known)
    accuracy = float(np.mean(all_guessed == all_known))
    if not any(re.fullmatch(MARK, name) for name in id2label.values()):
        return {"accuracy": accuracy, "f1_macro": _mean_f1(all_guessed, all_known)}
    right = found = there = 0
    for guess, labels in zip(guessed, known, strict=True):
        ours = set(entities([id2label[tag] for tag in guess.tolist()]))
        theirs = set(entities([id2label[tag] for tag in labels.tolist()]))
        right, found, there = right + len(ours & theirs), found + len(ours), there + len(theirs)
    scores = {"f1": ratio(2 * right, found + there), "precision": ratio(right, found), "recall": ratio(right, there)}
    return {"accuracy": accuracy, **scores}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a text, each by its kind, its first and its last word, as conlleval and seqeval find them.

    An entity may begin with an I- tag too, and ends where the kind changes.

    Example:
        >>> entities(["B-PER", "I-PER", "O", "I-LOC"])
        [('PER', 0, 1), ('LOC', 3, 3)]
    """
    found = []
    first, last_mark, last_kind = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = (tag[0], tag[2:]) if re.fullmatch(MARK, tag) else ("O", "")
        changes = kind != last_kind
        if last_mark != "O" and (mark in "BSO" or last_mark in "ES" or changes):
            found.append((last_kind, first, place - 1))
        if mark in "BS" or (mark != "O" and (last_mark in "ESO" or changes)):
            first = place
        last_mark, last_kind = mark, kind
    return found


def _mean_f1(guessed: np.ndarray, known: np.ndarray) -> float:
    """The mean F1 of the classes that are guessed or there."""
    scores = []
    for tag in np.union1d(guessed, known):
        right = np.sum((guessed == tag) & (known == tag))
        scores.append(ratio(2 * right, np.sum(guessed == tag) + np.sum(known == tag)))
    return float(np.mean(scores))
