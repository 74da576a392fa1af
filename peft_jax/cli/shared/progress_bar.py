"""The progress bar of a training run."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

WIDTH = 77  # of 80 columns, so that the terminal's ^C does not break the line
FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"

FEW = 4  # chunks, which are tokenized within a second


def progress(run: Iterable[Any], steps: int, *, done: int = 0, shown: bool = True) -> Any:
    """Wrap a run in a bar on stderr, that is gone when the run ends; a log gets one a minute."""
    watched = sys.stderr.isatty()
    return tqdm(
        run,
        total=steps,
        initial=done,
        unit="step",
        ncols=WIDTH,
        bar_format=FORMAT,
        leave=not watched,
        mininterval=0.1 if watched else 60,
        disable=not shown,
    )


def watched_encoding(starts: Sequence[int]) -> Any:
    """Wrap the chunks of records that are tokenized in such a bar; few records get none."""
    return progress(starts, len(starts), shown=len(starts) > FEW)


class Speed:
    """Tokens per second of training steps alone, the first one left out, which compiles.

    Example:
        >>> speed = Speed()
        >>> speed.add(100, 160), speed.add(100, 160) > 0
        (0.0, True)
        >>> speed.share
        0.625
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.mark = 0, 0.0, 0.0
        self.real, self.computed = 0, 0

    @property
    def share(self) -> float:
        """The share of the computed tokens that are no padding."""
        return self.real / max(self.computed, 1)

    def add(self, tokens: int, computed: int) -> float:
        """Count a step's tokens without and with padding, and return the speed so far by the former."""
        self.real, self.computed = self.real + tokens, self.computed + computed
        now = time.perf_counter()
        if self.mark:
            self.tokens += tokens
            self.seconds += now - self.mark
        self.mark = now
        return self.tokens / self.seconds if self.seconds else 0.0

    def skip(self) -> None:
        """Leave out the time since the last step: an evaluation's, a checkpoint's."""
        self.mark = time.perf_counter()
