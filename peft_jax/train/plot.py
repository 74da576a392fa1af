"""The loss curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FEW_POINTS = 40
SMOOTHED = 30  # a smoothed line follows about this share of the steps: one of so many
MOST = 0.98  # of many points, and of the line through them, are shown: the others are the first steps
EDGE = 0.05  # of the axis, above and below what it shows
Points = Sequence[tuple[int, float]]


def smoothed(values: Sequence[float], span: float) -> np.ndarray:
    """An exponential moving average whose first values are not drawn towards zero.

    Args:
        values: Losses in the order of their steps, (n,).
        span: The number of values that it averages, about.

    Returns:
        The averages, (n,).

    Example:
        >>> smoothed([4.0, 4.0, 2.0], 3).round(2).tolist()
        [4.0, 4.0, 2.86]
    """
    keep = 1 - 2 / (span + 1)
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return np.asarray(averages)


def limits(curves: Mapping[str, Points], lines: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The ends of the loss axis: between them are curves of few points whole, and those of many nearly so.

    The first steps of a long run, far above the others, do not press the rest together.

    Args:
        curves: The points by name.
        lines: The smoothed losses by name.

    Example:
        >>> bottom, top = limits({"a": [(1, 3.0), (2, 2.0)]}, {"a": np.array([3.0, 2.5])})
        >>> round(bottom, 2), round(top, 2)
        (1.95, 3.05)
    """
    shown = []
    for name, points in curves.items():
        losses, line = [loss for _, loss in points], lines[name]
        share = 1.0 if len(losses) <= FEW_POINTS else MOST
        shown += [min(losses), float(np.quantile(losses, share)), float(line.min()), float(np.quantile(line, share))]
    low, high = min(shown), max(shown)
    margin = EDGE * (high - low) or EDGE * max(abs(high), 1e-3)
    return low - margin, high + margin


def plot_losses(file: str | Path, curves: Mapping[str, Points], *, title: str) -> None:
    """Write loss curves as a PNG.

    The first curve is that of training: of many points it shows a smoothed line, and the points faintly. The others
    are measured now and then, and show each of their points; the least one of "validation" is marked.

    Args:
        file: Where to write.
        curves: By name, pairs of a step and a loss in nats per token.
        title: What was trained, on what.

    Example:
        >>> plot_losses("loss.png", {"training": [(1, 3.2), (2, 2.9)], "held-out": [(2, 3.0)]}, title="demo")
    """
    from matplotlib.figure import Figure  # not at the top: training takes no plot
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lines = {}
    for number, (name, points) in enumerate(curves.items()):
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        color = f"C{number}"
        if len(points) <= FEW_POINTS:
            lines[name] = np.asarray(losses)
            axes.plot(steps, losses, label=name, color=color, marker="o", markersize=5, linewidth=2)
        else:
            lines[name] = smoothed(losses, max(10, len(points) / SMOOTHED))
            axes.plot(steps, losses, ".", color=color, markersize=3, alpha=0.35, markeredgewidth=0)
            axes.plot(steps, lines[name], label=f"{name} (smoothed)", color=color, linewidth=2)
        if name == "validation":
            best, loss = min(points, key=lambda point: point[1])
            axes.plot([best], [loss], "*", color=color, markersize=14, label=f"best validation: {loss:.3f}")
    axes.set_title(title)
    axes.set_xlabel("training step (optimizer updates)")
    axes.set_ylabel("loss (nats per answer token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(*limits(curves, lines))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, format="png")
