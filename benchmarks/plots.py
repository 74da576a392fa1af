"""Plots of the benchmarks' records: speed beside PEFT's, memory, and the first step as depth grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Record = dict[str, Any]
OURS, THEIRS = "tab:blue", "tab:orange"
MULTIPLES = (0.5, 1, 2, 4)  # ticks of speed


def draw(records: Sequence[Record], folder: Path) -> list[tuple[str, Path]]:
    """Write the plots that the records allow; return what each shows, and its file."""
    plots = (
        ("Speed as a multiple of PEFT's", "benchmarks-speed.png", speed),
        ("Peak memory of training steps", "benchmarks-memory.png", memory),
        ("Time to the end of the first step, by depth", "benchmarks-depth.png", depth),
    )
    found = []
    for text, name, plot in plots:
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        if plot(records, axes):
            axes.set_title(text)
            figure.savefig(folder / name, dpi=100, metadata={"Software": None})
            found.append((text, folder / name))
        pyplot.close(figure)
    return found


def speed(records: Sequence[Record], axes: Any) -> bool:
    """Bars of the ratios of speed, from the lowest turn to the highest."""
    bars = [
        (f"{named(record)}: {ratio['what'].replace(' speed', '').replace('speed, ', 'step, ')}", ratio)
        for record in records
        for ratio in record["ratios"]
        if "speed" in ratio["what"] and "PEFT" in ratio["what"]
    ]
    for place, (_, one) in enumerate(bars):
        ends = [
            [one["median"] - min(one["lowest"], one["median"])],
            [max(one["highest"], one["median"]) - one["median"]],
        ]
        axes.barh(place, one["median"], color=OURS if one["median"] >= 1 else THEIRS, xerr=ends, ecolor="black")
    axes.set_yticks(range(len(bars)), [text for text, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks(MULTIPLES, [str(multiple) for multiple in MULTIPLES])
    axes.minorticks_off()
    axes.set_xlabel("blue: faster than PEFT, orange: slower; lines: the spread of turns", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    return bool(bars)


def memory(records: Sequence[Record], axes: Any) -> bool:
    """Bars of the contenders' bytes on the device, or on the host where that is the device."""
    bars = []
    for record in records:
        for row in record["rows"] if record["program"] in ("training_step", "int8_base") else ():
            size = row.get("device_peak_bytes") or row.get("host_bytes")
            if size:
                bars.append((f"{named(record)}: {row['name']}", size / 2**20, "peft" in row["name"]))
    for place, (_, size, theirs) in enumerate(bars):
        axes.barh(place, size, color=THEIRS if theirs else OURS)
    axes.set_yticks(range(len(bars)), [text for text, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    return bool(bars)


def depth(records: Sequence[Record], axes: Any) -> bool:
    """Lines of the first step and its parts, by the number of layers."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in (row for record in records if record["program"] == "startup" for row in record["rows"]):
        part, comma, rest = row["name"].partition(", ")
        if comma and "median" in row:
            layers, _, side = rest.partition(" layers: ")
            lines.setdefault(f"{part}, {side}", []).append((int(layers), row["median"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    if lines:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("layers")
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.legend()
    return bool(lines)


def named(record: Record) -> str:
    """A record's program, size and dtype."""
    settings = record["settings"]
    return " ".join([record["program"].replace("_", " "), settings.get("size", ""), settings.get("dtype", "")])
