"""The answers that a model finds in texts, and SQuAD's scores of them."""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from peft_jax.train.data.long_examples import IGNORE, Window
from peft_jax.train.data.records import Question
from peft_jax.train.scores import Guesses

BEST = 20  # ends of each window that are tried
LONGEST = 30  # tokens of an answer


def span_scores(records: Sequence[Question], windows: Sequence[Window], batches: Guesses) -> dict[str, float]:
    """SQuAD's exact match and F1, each the mean of the questions' best over their answers, from 0 to 1.

    Args:
        records: The questions.
        windows: The part of its text that each row has.
        batches: Logits of both ends (rows, length, 2) as guesses, and the number of each row's window.
    """
    logits: dict[int, list[tuple[Window, np.ndarray]]] = collections.defaultdict(list)
    for batch in batches:
        for number, guess in zip(batch["windows"].tolist(), batch["guesses"], strict=True):
            if number != IGNORE:
                logits[windows[number].record].append((windows[number], guess))
    may_be_none = any(not record.answers for record in records)
    exact, f1 = [], []
    for number, found in logits.items():
        record = records[number]
        answer = best_answer(record.context, found, may_be_none)
        known = [text for text, _ in record.answers] or [""]
        exact.append(max(normalized(answer) == normalized(text) for text in known))
        f1.append(max(word_f1(answer, text) for text in known))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def best_answer(context: str, found: Sequence[tuple[Window, np.ndarray]], may_be_none: bool) -> str:
    """The answer of the highest sum of both ends' logits, in all windows of a text.

    Args:
        context: The text.
        found: Windows of it, and the logits of both ends in each (length, 2).
        may_be_none: Whether no answer is one, if its logits, the least of all windows, are higher.

    Example:
        >>> window = Window(0, np.array([[-1, -1], [0, 3], [4, 9]]), 0)
        >>> best_answer("Ada wrote", [(window, np.array([[0, 0], [3, 2], [1, 0]]))], may_be_none=False)
        'Ada'
    """
    best, score, null = "", -np.inf, np.inf
    for window, logits in found:
        starts, ends = logits[: len(window.places), 0], logits[: len(window.places), 1]
        null = min(null, starts[window.null] + ends[window.null])
        for start in np.argsort(-starts, kind="stable")[:BEST]:
            for end in np.argsort(-ends, kind="stable")[:BEST]:
                in_text = window.places[start, 0] >= 0 and window.places[end, 0] >= 0
                if in_text and 0 <= end - start < LONGEST and starts[start] + ends[end] > score:
                    score = starts[start] + ends[end]
                    best = context[window.places[start, 0] : window.places[end, 1]]
    return "" if may_be_none and null > score else best


def word_f1(answer: str, known: str) -> float:
    """F1 of the words of two answers.

    Example:
        >>> word_f1("the red house", "a house")
        0.6666666666666666
    """
    ours, theirs = normalized(answer).split(), normalized(known).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def normalized(answer: str) -> str:
    """An answer in lower case without punctuation, articles and needless white space, as SQuAD's script compares it.

    Example:
        >>> normalized("The  red house.")
        'red house'
    """
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())
