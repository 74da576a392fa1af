"""The progress bar of a training run."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(run: Iterable[Any], steps: int) -> Any:
    """Wrap a run in a bar on stderr, 79 columns wide, that is gone when the run ends; a log gets one a minute."""
    watched = sys.stderr.isatty()
    return tqdm(run, total=steps, unit="step", ncols=79, leave=not watched, mininterval=0.1 if watched else 60)
