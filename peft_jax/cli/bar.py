"""The progress bar of a training run."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"


def progress(run: Iterable[Any], steps: int, *, done: int = 0) -> Any:
    """Wrap a run in a bar on stderr, 79 columns wide, that is gone when the run ends; a log gets one a minute."""
    watched = sys.stderr.isatty()
    return tqdm(
        run,
        total=steps,
        initial=done,
        unit="step",
        ncols=79,
        bar_format=FORMAT,
        leave=not watched,
        mininterval=0.1 if watched else 60,
    )


class Speed:
    """Tokens per second since the first step, which compiles, was done.

    Example:
        >>> speed = Speed()
        >>> speed.add(100), speed.add(100) > 0
        (0.0, True)
    """

    def __init__(self) -> None:
        self.start: float | None = None
        self.tokens = 0

    def add(self, tokens: int) -> float:
        """Count a step's tokens and return the speed."""
        now = time.monotonic()
        if self.start is None:
            self.start = now
            return 0.0
        self.tokens += tokens
        return self.tokens / max(now - self.start, 1e-9)
