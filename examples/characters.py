"""What the adapt_*.py programs learn: the next character of Python source, then of a licence's English."""

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax

PYTHON, ENGLISH = inspect.getsource(textwrap), (Path(__file__).parents[1] / "LICENSE").read_text()
SAMPLE = np.array([list(b"Licensor"), list(b"You may ")])


def batches(text: str, steps: int = 100) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of 64 times 8 characters and the one that follows, as numbers below 128."""
    windows = np.lib.stride_tricks.sliding_window_view(np.array([*map(ord, text)], np.int32), 9)
    for number in range(steps):
        rows = windows[np.random.default_rng(number).integers(len(windows), size=64)]
        yield rows[:, :8], rows[:, 8]


def cross_entropy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    """The mean loss of logits (batch, 128)."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def report(losses: list[jax.Array]) -> None:
    """Prints what training did."""
    print(f"  loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f} in {len(losses)} steps")
