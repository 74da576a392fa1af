"""Lays out docs/chips.md, a section a chip, from the records in docs/chips/.

    python3 benchmarks/chip_report.py [FOLDER]

Needs nothing but Python. What is written follows from the records alone, so that sections of other chips stay.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shapes import SHAPES, weight_flops

Measurement = Mapping[str, Any]
HEAD = """# Measured on chips

Written by `make bench-chip` on a machine with a GPU or TPU, from the records in `docs/chips/`; a section for each chip.
Weights are random and made on the chip. The contenders of a table ran in turn, ours in JAX, PEFT's in PyTorch.
Figures are medians; two contenders are compared over the turns in which both ran. TFLOP/s count 4 operations a weight
a token: the product forward and the gradient of its input. Those of adapters and attention are left out, and so are
layers that are computed again. The limit is the time of the counted products alone, the peak that of a product of
square matrices in bfloat16; both are measured by JAX. Memory is what a step needs with weights and optimizer: by the
compiler for JAX, by the allocator's peak for PyTorch. The loss is that of the first step. Random weights of the two
sides differ.
"""
NOTHING = """No figure of a chip is on record yet: nothing here was ever measured on one. `make bench-chip` on a machine
with a GPU or TPU adds its section. It takes 6 minutes at most, and needs nothing but jax (for that chip), flax, optax,
orbax-checkpoint, transformers and safetensors, and for the comparison torch and peft.
"""


class Goal(NamedTuple):
    """What a figure is to be at least.

    Attributes:
        text: In words.
        parts: Of the measurements.
        over: Whose speed.
        below: Over whose; None for tokens a second.
        least: The bound.
        chip: On which chips, by a part of the name.
    """

    text: str
    parts: tuple[str, ...]
    over: str
    below: str | None
    least: float
    chip: str = ""


GOALS = (
    Goal(
        "8B in bfloat16: at least 14,800 tokens/s on an H200",
        ("train 8b", "train 8b more rows", "train 8b recomputed"),
        "ours bf16",
        None,
        14_800,
        "H200",
    ),
    Goal("8B: int8 not slower than bfloat16", ("train 8b",), "ours int8", "ours bf16", 1.0),
    Goal("8B: at least 2 times PEFT's speed", ("train 8b",), "ours bf16", "peft bf16", 2.0),
    Goal("8B: at least 1.2 times PEFT compiled", ("train 8b compiled",), "ours bf16", "peft compiled", 1.2),
)


def write(docs: Path) -> None:
    """Write chips.md from the records beside it."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((docs / "chips").glob("*.json"))]
    docs.mkdir(parents=True, exist_ok=True)
    sections = [section(record) for record in records] or [NOTHING]
    (docs / "chips.md").write_text("\n".join([HEAD, *sections]).rstrip() + "\n", encoding="utf-8")


def section(record: Mapping[str, Any]) -> str:
    """What was measured on a chip."""
    measurements = list(record["measurements"].values())
    lines = [f"## {record['chip']}", ""]
    if peak := peak_flops(measurements):
        lines += [f"Peak of products of matrices: {peak / 1e12:,.1f} TFLOP/s.", ""]
    lines += goals(record["chip"], measurements)
    for part in dict.fromkeys(one["name"] for one in measurements if one["work"] != "matmul"):
        rows = [one for one in measurements if one["name"] == part]
        lines += [f"### {part}", "", described(rows[0]), ""]
        lines += training(rows, measurements) if rows[0]["work"] == "train" else decoding(rows)
        lines += not_run(rows)
    return "\n".join(lines)


def described(row: Measurement) -> str:
    """The work of a part, and what it ran with."""
    if row["work"] == "train":
        recomputed = ", each layer computed again in the backward pass" if row["remat"] else ""
        return f"LoRA r={row['rank']} on all linear layers, {row['rows']} rows of {row['length']} tokens{recomputed}."
    adapters = f"LoRA r={row['rank']} on all linear layers, not merged"
    return f"Greedy decoding of {row['new'] - 1} tokens after prompts of {row['length']}, bfloat16, {adapters}."


def training(rows: Sequence[Measurement], everything: Sequence[Measurement]) -> list[str]:
    """The table of training steps, and how they compare."""
    titles = [
        "",
        "tokens/s",
        "TFLOP/s",
        "of the limit",
        "of the peak",
        "GiB",
        "ms",
        "from, to",
        "built in s",
        "loss",
    ]
    body = []
    for row in [row for row in rows if row.get("seconds")]:
        seconds = statistics.median(row["seconds"])
        tokens = row["rows"] * row["length"]
        speed = weight_flops(SHAPES[row["size"]], tokens) / seconds
        spread = f"{1e3 * min(row['seconds']):,.1f} to {1e3 * max(row['seconds']):,.1f}"
        cells = [row["contender"], f"{tokens / seconds:,.0f}", f"{speed / 1e12:,.1f}"]
        cells += [share(limit_seconds(row, everything), seconds), share(speed, peak_flops(everything))]
        peak = row["facts"].get("peak_bytes")
        cells += ["" if peak is None else f"{peak / 2**30:.2f}", f"{1e3 * seconds:,.1f}", spread]
        loss = row["facts"].get("loss")
        body.append([*cells, f"{row['built_seconds']:.0f}", "" if loss is None else f"{loss:.3f}"])
    return [*table(titles, body), *versions(rows), *speeds(rows, "ours bf16", ("peft bf16", "peft compiled"))]


def decoding(rows: Sequence[Measurement]) -> list[str]:
    """The table of decoding, and how both sides compare."""
    body = []
    for row in [row for row in rows if row.get("seconds")]:
        seconds = statistics.median(row["seconds"])
        spread = f"{1e3 * min(row['seconds']):,.1f} to {1e3 * max(row['seconds']):,.1f}"
        speed = f"{row['facts']['tokens'] / seconds:,.0f}" if seconds > 0 else "too short to be told from the prefill"
        body.append([row["contender"], speed, f"{1e3 * seconds:,.1f}", spread])
    lines = [*table(["", "tokens/s", "ms", "from, to"], body), *versions(rows)]
    for kind in dict.fromkeys(row["contender"].split(": ")[1] for row in rows):
        lines += speeds(rows, f"ours: {kind}", (f"peft: {kind}",))
    return lines


def speeds(rows: Sequence[Measurement], over: str, others: Sequence[str]) -> list[str]:
    """The sentences on how a contender's speed compares with others'."""
    lines = []
    for below in others:
        ratio = speed_ratio(rows, over, below)
        if ratio is not None:
            lines += [f"- {over} runs at {ratio:.2f} times the speed of {below}.", ""]
    return lines


def speed_ratio(rows: Sequence[Measurement], over: str, below: str) -> float | None:
    """How many times as fast a contender is, by the turns that both took in one run; None if there are none."""
    by_name = {row["contender"]: row for row in rows if row.get("seconds")}
    if over not in by_name or below not in by_name or by_name[over]["run"] != by_name[below]["run"]:
        return None
    first, second = (dict(zip(by_name[one]["turns"], by_name[one]["seconds"], strict=True)) for one in (over, below))
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    fast, slow = (statistics.median(times[turn] for turn in shared) for times in (first, second))
    return slow / fast if fast > 0 and slow > 0 else None


def goals(chip: str, measurements: Sequence[Measurement]) -> list[str]:
    """The table of goals."""
    body = []
    for goal in GOALS:
        if goal.chip not in chip:
            continue
        rows = [one for one in measurements if one["name"] in goal.parts]
        found = fastest(rows, goal.over) if goal.below is None else speed_ratio(rows, goal.over, goal.below)
        met = "not measured"
        if found is not None:
            met = "met" if found >= goal.least else "**not met**"
        body.append([goal.text, met, "" if found is None else f"{found:,.2f}"])
    return table(["goal", "", "figure"], body)


def fastest(rows: Sequence[Measurement], contender: str) -> float | None:
    """The most tokens a second of a training contender; None if it was not timed."""
    timed = [row for row in rows if row["contender"] == contender and row.get("seconds")]
    speeds = [row["rows"] * row["length"] / statistics.median(row["seconds"]) for row in timed]
    return max(speeds, default=None)


def peak_flops(measurements: Sequence[Measurement]) -> float | None:
    """Operations a second of the products of square matrices; None if they were not timed."""
    for one in measurements:
        if one["work"] == "matmul" and one.get("seconds"):
            return float(2 * int(one["size"]) ** 3 / statistics.median(one["seconds"]))
    return None


def limit_seconds(row: Measurement, measurements: Sequence[Measurement]) -> float | None:
    """The time of the products with frozen weights alone, of as many tokens; None if it was not measured."""
    for one in measurements:
        alike = all(one[field] == row[field] for field in ("work", "size", "rows", "length"))
        if one["contender"] == "limit" and alike and one.get("seconds"):
            return float(statistics.median(one["seconds"]))
    return None


def share(part: float | None, whole: float | None) -> str:
    """A share in words; empty where one of both is not known."""
    return "" if part is None or whole is None else f"{part / whole:.1%}"


def not_run(rows: Sequence[Measurement]) -> list[str]:
    """The sentences on what has no figure, or fewer."""
    lines = []
    for row in rows:
        if "not_run" in row:
            lines += [f"- {row['contender']}: not run: {row['not_run']}.", ""]
        if "stopped" in row:
            lines += [f"- {row['contender']}: stopped after {len(row['seconds'])} runs: {row['stopped']}.", ""]
    return lines


def versions(rows: Sequence[Measurement]) -> list[str]:
    """What the rows that were timed ran with, and when."""
    found = {}
    for row in rows:
        if row.get("seconds"):
            packages = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            found[packages] = row["run"][:10]
    lines: list[str] = []
    for packages, date in found.items():
        lines += [f"{packages}; {date}.", ""]
    return lines


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; nothing without rows."""
    if not rows:
        return []
    right = ["---", *["---:"] * (len(titles) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, right, *rows)] + [""]


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs")
