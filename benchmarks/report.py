"""Lays out what the benchmarks recorded: docs/benchmarks.md, docs/benchmarks.json, plots, and the README's summary.

    python benchmarks/report.py

Reads the records of this machine's last `make bench`, and those kept in benchmarks/records/ from other machines. The
README's summary stands between two comments, ``<!-- benchmarks -->`` and ``<!-- end of benchmarks -->``.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lowering_table
import measure
import plots
import tyro

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- benchmarks -->", "<!-- end of benchmarks -->")
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a ratio is to be.

    Attributes:
        text: The target in words.
        program: Whose records are read.
        ratio: Their ratio, as a regex.
        bound: What it is compared with.
        at: Whether it is to be at least or at most that.
        device: On what kind of device; None for any.
        dtype: Of which records; None for any.
    """

    text: str
    program: str
    ratio: str
    bound: float
    at: Literal["least", "most"]
    device: Literal["cpu", "gpu"] | None = None
    dtype: str | None = None

    def judge(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """A row for each record that has the ratio, or one that says that none has it."""
        found = []
        for record in records:
            device = "cpu" if "cpu" in record["machine"]["device"].lower() else "gpu"
            fits = record["program"] == self.program and self.device in (None, device)
            for ratio in record["ratios"] if fits and self.dtype in (None, record["settings"].get("dtype")) else ():
                if re.fullmatch(self.ratio, ratio["what"]):
                    value = ratio["median"]
                    met = value >= self.bound if self.at == "least" else value <= self.bound
                    found.append({"target": self.text, "at": title(record), "value": value, "met": met})
        return found or [{"target": self.text, "at": None, "value": None, "met": None}]


STEP, INT8, START, PADDING, MANY = "training_step", "int8_base", "startup", "padding", "many_prompts"
REAL = "computed over real tokens"
MEMORY = "peak memory at most PEFT's, both recomputing layers"
TARGETS = (
    Target("CPU: training step at least 1.0× PEFT's speed", STEP, "speed, times PEFT", 1.0, "least", "cpu"),
    Target("GPU: training step at least 1.5× PEFT eager", STEP, "speed, times PEFT", 1.5, "least", "gpu"),
    Target("GPU: training step at least 1.1× PEFT compiled", STEP, "speed, times PEFT compiled", 1.1, "least", "gpu"),
    Target("LoRA step at most 1.1× the step without the adapters' products", STEP, "step, times .*", 1.1, "most"),
    Target(f"CPU: {MEMORY}", STEP, "host memory, ours-remat over .*", 1.0, "most", "cpu"),
    Target(f"GPU: {MEMORY}", STEP, "device peak memory, ours-remat over .*", 1.0, "most", "gpu"),
    Target(
        "GPU: decoding with int8 faster than bf16", INT8, "decode speed, times dense", 1.0, "least", "gpu", "bfloat16"
    ),
    Target(
        "packed: at most 1.10 computed tokens a real one, batch 128", PADDING, f"{REAL}, packed, .* 128", 1.1, "most"
    ),
    Target("packed: the same at most 1.25, batch 16", PADDING, f"{REAL}, packed, .* 16", 1.25, "most"),
    Target("one text a row: the same at most 1.35, batch 16", PADDING, f"{REAL}, one text .* 16", 1.35, "most"),
    Target("CPU: a real token at most 0.65 of PEFT's time", PADDING, "packed, .* over PEFT's", 0.65, "most", "cpu"),
    Target(
        "CPU: the same at most 0.95 of PEFT's, grouped by length", PADDING, "packed, .* by length", 0.95, "most", "cpu"
    ),
    Target(
        "CPU: reading at most 1.5× safetensors' own time", START, "read .* over safetensors' own", 1.5, "most", "cpu"
    ),
    Target(
        "CPU: peak of a short answer at most 1.5× the weights + 500 MiB",
        START,
        "host peak memory, .*: ours over 1.5 times .*",
        1.0,
        "most",
        "cpu",
    ),
    Target(
        "CPU: many prompts at least 1.0× PEFT's speed", MANY, "speed, .* filled rows, times PEFT", 1.0, "least", "cpu"
    ),
    Target("trace time flat in depth (at most 1.2×)", START, "trace, .*", 1.2, "most"),
    Target("compile time flat in depth (at most 1.2×)", START, "compile, .*", 1.2, "most"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where to read and to write.

    Attributes:
        records: Folders of records; those that are not there are left out.
        docs: Folder of the page, the JSON and the plots.
        readme: File whose summary is written anew.
    """

    records: tuple[Path, ...] = (measure.BUILD / "records", ROOT / "benchmarks" / "records")
    docs: Path = ROOT / "docs"
    readme: Path = ROOT / "README.md"


def compiled(file: Path) -> list[Record]:
    """The answers of programs that were compiled ahead of time, from the records of `lowering.py`."""
    if not file.is_file():
        return [{"target": f"{BY_COMPILER}: `make lowering`", "at": None, "value": None, "met": None}]
    records = list(json.loads(file.read_text(encoding="utf-8")).values())
    answers = [*lowering_table.fits(records), *lowering_table.int8_share(records)]
    return [one | {"target": f"{BY_COMPILER}: {one['target']}"} for one in answers]


BY_COMPILER = "by the compiler's word"


def read_records(folders: Sequence[Path]) -> list[Record]:
    """All records of the folders.

    Raises:
        SystemExit: If there is none.
    """
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    if not files:
        where = " or ".join(map(str, folders))
        raise SystemExit(f"no records in {where}. Run make bench, or one of the programs beside this one.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def title(record: Record) -> str:
    """What a record is of, in a few words."""
    settings = record["settings"]
    parts = [str(settings[part]) for part in ("size", "dtype") if part in settings]
    device = record["machine"]["device"]
    return ", ".join([record["program"].replace("_", " "), *parts] + ([] if "cpu" in device.lower() else [device]))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def row_cells(row: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """A row's cells: name, median and spread, then the fields."""
    if "not_run" in row:
        return [row["name"], f"not run: {row['not_run']}", "", *[""] * len(fields)]
    time, spread = "", ""
    if "median" in row:
        time = f"{1e3 * row['median']:,.1f}"
        spread = f"{1e3 * row['fastest']:,.1f} to {1e3 * row['slowest']:,.1f}"
    return [row["name"], time, spread, *(figure(row.get(field), field) for field in fields)]


def figure(value: Any, field: str) -> str:
    """A number as the table shows it."""
    if value is None:
        return ""
    if field.endswith("_bytes"):
        return f"{value / 2**20:,.0f}"
    if field == "flops_per_second":
        return f"{value / 1e9:,.0f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


HEADS = {"tokens_per_second": "tokens/s", "flops_per_second": "GFLOP/s"}


def section(record: Record) -> list[str]:
    """A record's part of the page."""
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items() if key != "contenders")
    known = ("name", "seconds", "median", "fastest", "slowest", "not_run")
    fields = [field for row in record["rows"] for field in row if field not in known]
    fields = [field for field in dict.fromkeys(fields) if any(row.get(field) is not None for row in record["rows"])]
    heads = [
        HEADS.get(field, field.replace("_bytes", " MiB").replace("_seconds", " s").replace("_", " "))
        for field in fields
    ]
    lines = [f"## {title(record).capitalize()}", "", machine_line(record), "", f"Settings: {settings}.", ""]
    lines += table(["", "ms", "from, to", *heads], [row_cells(row, fields) for row in record["rows"]])
    if record["ratios"]:
        cells = [
            [
                one["what"],
                f"{one['median']:.3f}",
                *(f"{one[key]:.3f}" if key in one else "" for key in ("fastest", "lowest", "highest")),
            ]
            for one in record["ratios"]
        ]
        lines += ["", *table(["ratio", "of medians", "of fastest runs", "lowest turn", "highest turn"], cells)]
    return [*lines, ""]


def machine_line(record: Record) -> str:
    """Where and with what a record was made."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, JAX on {machine['device']}"
    return f"{where}; Python {machine['python']}, {versions}; {machine['date'][:10]}."


def target_lines(judged: Sequence[dict[str, Any]]) -> list[str]:
    """The targets, each met or not with its figure."""
    rows = []
    for one in judged:
        if one["met"] is None:
            rows.append([one["target"], "not measured", "", ""])
        else:
            rows.append([one["target"], "met" if one["met"] else "**not met**", f"{one['value']:.2f}", one["at"]])
    return table(["target", "", "figure", "from"], rows)


def speed_lines(records: Sequence[Record]) -> list[str]:
    """All ratios to PEFT's speed."""
    rows = [
        [one["what"], title(record), f"{one['median']:.2f}", f"{one['lowest']:.2f} to {one['highest']:.2f}"]
        for record in records
        for one in record["ratios"]
        if "PEFT" in one["what"] and "speed" in one["what"]
    ]
    return table(["speed", "of", "ratio", "turns from, to"], rows)


def summary_lines(records: Sequence[Record], judged: Sequence[dict[str, Any]], page: str) -> list[str]:
    """A line on the machine, how many targets are met, and where the page of all figures is."""
    outcomes = [one["met"] for one in judged]
    counted = {"met": outcomes.count(True), "not met": outcomes.count(False), "not measured": outcomes.count(None)}
    answers = ", ".join(f"{count} {outcome}" for outcome, count in counted.items())
    targets = f"Of the targets, which are on the [page of all figures]({page}): {answers}."
    return [f"On {machine_line(records[0])}", "", targets]


def write_readme(file: Path, lines: Sequence[str]) -> None:
    """Put a new summary between the README's marks.

    Raises:
        SystemExit: If they are not there.
    """
    text = file.read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise SystemExit(f"{file} lacks the lines {MARKS[0]} and {MARKS[1]}. Put them where the summary is to stand.")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    file.write_text("\n".join([before + MARKS[0], *lines, MARKS[1]]) + after, encoding="utf-8")


def main(settings: Settings) -> None:
    """Write the page, the JSON, the plots and the summary."""
    records = read_records(settings.records)
    judged = [row for target in TARGETS for row in target.judge(records)] + compiled(settings.docs / "lowering.json")
    settings.docs.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(records, settings.docs)
    accelerated = any("cpu" not in record["machine"]["device"].lower() for record in records)
    note = [] if accelerated else ["No GPU or TPU was at hand: all that is measured was measured on the CPU.", ""]
    targets = [*target_lines(judged), "", *note]
    speeds = speed_lines(records)
    page = [
        "# Benchmarks",
        "",
        "Written by `make bench`. All contenders of a section ran in turn in one process, so that its ratios compare",
        "like with like; times are medians. Memory is that of one contender in a process of its own, beside what its",
        "imports take: `host` while steps run, `host peak` with reading, tracing and compiling, `xla` by the compiler",
        "alone.",
        "",
        *targets,
        "All that ran beside PyTorch PEFT: ratios are of medians, with their spread over the turns.",
        "",
        *speeds,
        "",
        *(line for text, file in pictures for line in (f"![{text}]({file.name})", "")),
    ]
    page += [line for record in records for line in section(record)]
    (settings.docs / "benchmarks.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    whole = {"targets": judged, "records": records}
    (settings.docs / "benchmarks.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    folder = settings.docs.name
    summary = summary_lines(records, judged, f"{folder}/benchmarks.md")
    shown = [f"![{text}]({folder}/{file.name})" for text, file in pictures[:1]]  # the speed
    write_readme(settings.readme, [*summary, *note[:1], "", *shown])
    print("\n".join([*targets, *speeds]))
    print(
        f"Wrote {settings.docs / 'benchmarks.md'}, the JSON and plots beside it, and the summary in {settings.readme}."
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
