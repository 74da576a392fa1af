"""The loss curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FEW_POINTS = 40


def plot_losses(file: str | Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, title: str) -> None:
    """Write loss curves as a PNG; a curve of few points shows each of them.

    Args:
        file: Where to write.
        curves: By name, pairs of a step and a loss in nats per token.
        title: What was trained, on what.

    Example:
        >>> plot_losses("loss.png", {"training": [(1, 3.2), (2, 2.9)], "held-out": [(2, 3.0)]}, title="demo")
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        few = len(points) <= FEW_POINTS
        axes.plot(
            [step for step, _ in points],
            [loss for _, loss in points],
            label=name,
            marker="o" if few else None,
            linewidth=2 if few else 1,
            alpha=1 if few else 0.6,
        )
    axes.set_title(title)
    axes.set_xlabel("training step (optimizer updates)")
    axes.set_ylabel("loss (nats per answer token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, format="png")
