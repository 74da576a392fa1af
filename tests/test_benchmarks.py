"""The benchmarks run at a tiny size and record what they say; no test looks at a time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # what the benchmarks compare with
import pytest
from quick_compilation import NO_FUSION_EMITTERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "training_step": "--batch 1 --length 8 --rank 2 --no-memory --contenders ours peft products-torch",
    "int8_base": "--length 8 --new 2 --rank 2 --no-memory --no-remat --contenders int8 peft-int8",
    "generation": "--batch 1 --rows 2 --adapters 2 --prompt 4 --new 3 --rank 2",
    "many_prompts": "--prompts 3 --rows 2 --prompt 4 --longest 4 --rank 2",
    "startup": "--depths 1 --length 8 --rank 2 --answer 2 --no-memory",
    "padding": "--batch 2 --micro 1 --steps 1 --longest 32 --rank 2",
}
ROWS = {
    "training_step": {"ours", "peft", "products-torch"},
    "int8_base": {"int8", "peft-int8"},
    "generation": {
        f"{kind}: {side} {part}"
        for kind in ("unmerged", "merged", "2 in a batch")
        for side in ("ours", "peft")
        for part in ("prefill", "decode")
    },
    "many_prompts": {"filled rows", "batches", "peft"},
    "padding": {"packed", "one text a row", "peft", "peft grouped"},
    "startup": {
        f"{what}: {side}"
        for what in (
            "import",
            "read the checkpoint",
            "attach LoRA",
            "write the adapter",
            "read the adapter",
            "answer a prompt",
        )
        for side in ("ours", "peft")
    }
    | {"read the checkpoint: safetensors"}
    | {f"first step, 1 layers: {side}" for side in ("ours", "peft")}
    | {f"{part}, 1 layers: ours" for part in ("trace", "compile")},
}


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{program}.py"), *options]
    flags = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", NO_FUSION_EMITTERS)
    quick = {"XLA_FLAGS": " ".join(flags)}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quick, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    "program",
    [
        "training_step",
        pytest.param("padding", marks=pytest.mark.slow),
        pytest.param("startup", marks=pytest.mark.slow),
        pytest.param("int8_base", marks=pytest.mark.slow),
        pytest.param("generation", marks=pytest.mark.slow),
        pytest.param("many_prompts", marks=pytest.mark.slow),
    ],
)
def test_a_program_runs_and_records(program: str, tmp_path: Path) -> None:
    done = run(program, "--size", "tiny", "--repeats", "1", "--build", str(tmp_path), *SMALL[program].split())
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "records").iterdir()
    record = json.loads(file.read_text())
    assert record["program"] == program and record["settings"]["size"] == "tiny"
    assert {"cpu", "cores", "device", "python", "versions", "date"} == set(record["machine"])
    assert {row["name"] for row in record["rows"]} == ROWS[program]
    timed = [row for row in record["rows"] if "not_run" not in row]
    for row in record["rows"]:
        told = ("bitsandbytes",) if row["name"] == "peft-int8" else ("too short",) if "decode" in row["name"] else ()
        assert "median" in row or any(row["not_run"].startswith(reason) for reason in told)
    for row in timed:
        assert len(row["seconds"]) == 1 and row["median"] == row["fastest"] == row["slowest"] == row["seconds"][0] > 0
        assert row["name"] in done.stdout
    by_name = {row["name"]: row["median"] for row in timed}
    counted = [ratio for ratio in record["ratios"] if ratio["above"] == "computed"]  # tokens, not times
    assert len(counted) == (6 if program == "padding" else 0) and all(ratio["median"] >= 1 for ratio in counted)
    for ratio in (ratio for ratio in record["ratios"] if ratio not in counted):
        assert ratio["median"] == pytest.approx(by_name[ratio["above"]] / by_name[ratio["below"]])
    if program == "padding":
        losses = [row["loss"] for row in timed if row["name"] != "peft grouped"]  # which has other batches
        assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    if program == "training_step":
        ours, theirs = (next(row["loss"] for row in timed if row["name"] == name) for name in ("ours", "peft"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        row = next(row for row in timed if row["name"] == "ours")
        assert row["xla_bytes"] > row["xla_temporary_bytes"] > 0
        assert [ratio["what"] for ratio in record["ratios"]] == [
            "speed, times PEFT",
            "share of the limit, ours",
            "share of the limit, peft",
        ]


@pytest.mark.slow
def test_memory_is_taken_in_a_process_of_its_own(tmp_path: Path) -> None:
    small = ["--size", "tiny", "--length", "8", "--repeats", "1", "--build", str(tmp_path), "--contenders", "peft"]
    done = run("training_step", *small)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(next((tmp_path / "records").iterdir()).read_text())["rows"]
    assert row["host_peak_bytes"] is None or row["host_peak_bytes"] >= row["host_bytes"] > 0
    assert row["device_peak_bytes"] is None or row["device_peak_bytes"] > 0


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("training_step", ["--size", "2b"], "2b"),
        ("training_step", ["--contenders", "ours", "theirs"], "no contender is named theirs. Take some of ours, "),
        ("generation", ["--adapters", "3"], "--adapters 3 does not divide --rows 64. Give divisors of it."),
        ("generation", ["--new", "1"], "--new 1 leaves nothing to decode after the prefill. Give 2 or more."),
        ("padding", ["--micro", "3"], "--micro 3 does not divide --batch 16. Give a divisor of it."),
        ("startup", ["--depths", "0"], "--depths 0 is no number of layers. Give 1 or more."),
        ("report", ["--records", "nowhere"], "no records in nowhere. Run make bench"),
    ],
)
def test_wrong_options_are_told(program: str, options: list[str], message: str) -> None:
    done = run(program, *options)
    assert done.returncode != 0 and message in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_missing_pytorch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"torch and peft cannot be imported. Install them: .*\[benchmarks\].*Or do"):
        measure.require_pytorch("Or do without.")


def test_contenders_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    ran: list[str] = []
    contenders = [measure.Contender(name, lambda name=name: ran.append(name)) for name in "ab"]
    times = measure.interleave(contenders, 2)
    assert ran == ["a", "b"] * 3 and {name: len(row) for name, row in times.items()} == {"a": 2, "b": 2}

    ran.clear()
    prepared = measure.Contender("c", lambda: ran.append("c"), before=lambda: ran.append("before"))
    measure.interleave([prepared], 1)
    assert ran == ["before", "c"] * 2
    rows = [
        measure.row(contender, seconds) for contender, seconds in zip(contenders, ([6, 2, 4], [1, 2, 4]), strict=True)
    ]
    found = measure.ratio("speed", *rows)
    assert (found["median"], found["fastest"], found["lowest"], found["highest"]) == (2, 2, 1, 6)


def record(program: str, device: str, ratios: dict[str, float], **row: Any) -> dict[str, Any]:
    versions = {"jax": "0.10.2"}
    machine = {
        "cpu": "c",
        "cores": 2,
        "device": device,
        "python": "3.11",
        "versions": versions,
        "date": "2026-01-01T00",
    }
    found = [{"what": what, "above": "a", "below": "b", "median": value} for what, value in ratios.items()]
    timed = [one | {"fastest": one["median"], "lowest": 0.5, "highest": 4.0} for one in found]
    settings = {"size": "30m", "dtype": "float32"}
    rows = [{"name": "ours", "seconds": [1.0], "median": 1.0, "fastest": 1.0, "slowest": 1.0, **row}]
    return {"program": program, "settings": settings, "machine": machine, "rows": rows, "ratios": timed}


def test_report(tmp_path: Path) -> None:
    records = [
        record("training_step", "1 x cpu", {"speed, times PEFT": 1.25, "step, times that": 1.5}, host_bytes=3 * 2**20),
        record("startup", "1 x cpu", {}) | {"rows": [{"name": "peft", "not_run": "no compiler"}]},
    ]
    (tmp_path / "records").mkdir()
    for number, one in enumerate(records):
        (tmp_path / "records" / f"{number}.json").write_text(json.dumps(one))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- end of benchmarks -->\nafter\n")
    folders = ["--records", str(tmp_path / "records"), "--docs", str(tmp_path / "docs"), "--readme", str(readme)]
    (tmp_path / "docs").mkdir()
    compiled = {"size": "70b", "base": "int8", "work": "train", "chip": "v5e:4x4", "per_chip": 17 * 2**30}
    compiled |= {"mesh": "fsdp=16", "rows": 16, "length": 9, "micro": 16}
    (tmp_path / "docs" / "lowering.json").write_text(json.dumps({"one": compiled}))
    done = run("report", *folders)
    assert done.returncode == 0, done.stderr
    page, summary = (tmp_path / "docs" / "benchmarks.md").read_text(), readme.read_text()
    assert json.loads((tmp_path / "docs" / "benchmarks.json").read_text())["records"] == records
    assert "| CPU: training step at least 1.0× PEFT's speed | met | 1.25 | training step, 30m, float32 |" in page
    assert "| **not met** | 1.50 | training step" in page
    assert "| GPU: training step at least 1.5× PEFT eager | not measured |" in page
    assert "16 chips of 16 GiB | **not met** | 17.00 | 70b, int8, v5e:4x4 |" in page
    assert "| speed, times PEFT | training step, 30m, float32 | 1.25 | 0.50 to 4.00 |" in page
    outcomes = re.search(r"(\d+) met, (\d+) not met, (\d+) not measured", summary)
    wanted = (page.count(" | met | "), page.count("**not met**"), page.count("| not measured |"))
    assert outcomes is not None and tuple(map(int, outcomes.groups())) == wanted and wanted[1] > 0
    assert "](docs/benchmarks.md)" in summary
    for text in (page, summary):
        assert "No GPU or TPU was at hand" in text
    assert "| ours | 1,000.0 | 1,000.0 to 1,000.0 | 3 |" in page and "not run: no compiler" in page
    assert summary.startswith("before\n<!-- benchmarks -->\nOn c, 2 cores") and "old" not in summary
    assert summary.endswith("<!-- end of benchmarks -->\nafter\n")
    assert (tmp_path / "docs" / "benchmarks-speed.png").stat().st_size > 1000
    assert "](docs/benchmarks-speed.png)" in summary and "](benchmarks-speed.png)" in page

    readme.write_text("no marks")
    done = run("report", *folders)
    assert done.returncode != 0 and "lacks the lines <!-- benchmarks -->" in done.stderr
    assert readme.read_text() == "no marks"
