"""`make bench-chip`: what it does with processes, time and records, and its contenders at a tiny size on this CPU.

`make test-image` rehearses the whole of it with the versions of a GPU image.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import chip  # noqa: E402
import chip_report  # noqa: E402
from chip_plan import FIRST, PARTS, TINY, Part, side_of  # noqa: E402
from chip_process import Clock, Failed, Worker  # noqa: E402
from chip_record import Record  # noqa: E402

# Answers as chip_worker.py does. What a contender does is told by a table of names.
FAKE = """
import json, sys, time
device, deeds = json.loads(sys.argv[1])
print(json.dumps({"device": device, "versions": {"jax": "1.2"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    (verb, name), = request.items()
    deed = deeds.get(name, 0.25)
    if deed == "hang": time.sleep(100)
    if deed == "die": sys.exit(3)
    if deed == "fail " + verb: answer = {"failed": "out of memory"}
    elif verb == "build": answer = {"facts": {"peak_bytes": 2**30, "loss": 5.5, "tokens": 8}}
    else: answer = {"seconds": deed if isinstance(deed, float) else 0.5}
    print(json.dumps(answer), flush=True)
"""
MATMUL = Part("matmul", "matmul", "64", (("matmul",),))
TRAIN = Part("train 8b", "train", "8b", (FIRST, ("ours nf4", "peft compiled")), length=2048)
DECODE = Part("decode 1b", "decode", "1b", (("ours: 1 row", "peft: 1 row"),), new=9)


def fake(deeds: dict[str, Any], jax: str = "Chip H200", torch: str = "Chip H200") -> Callable[[Part, str], Worker]:
    """Starts processes that only answer."""

    def start(part: Part, side: str) -> Worker:
        about = json.dumps([jax if side == "jax" else torch, deeds])
        return Worker([sys.executable, "-S", "-c", FAKE, about])

    return start


def measured(record: Record, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record.file.read_text())["measurements"][name]
    return found


def test_contenders_are_timed_in_turn_and_laid_out(tmp_path: Path) -> None:
    (tmp_path / "chips").mkdir()
    other = {"chip": "Other", "measurements": {}}
    (tmp_path / "chips" / "other.json").write_text(json.dumps(other))
    deeds = {"limit": 0.1, "ours bf16": 0.2, "peft bf16": 0.5, "ours int8": 0.25, "peft compiled": "fail build"}
    deeds |= {"ours nf4": "fail run", "ours: 1 row": 0.5, "peft: 1 row": 1.0, "matmul": 1e-6}
    record = chip.run([MATMUL, TRAIN, DECODE], 2, tmp_path, start=fake(deeds))
    assert record.file == tmp_path / "chips" / "chip-h200.json"
    ours = measured(record, "train 8b: ours bf16")
    assert ours["seconds"] == [0.2] * 10 and ours["turns"] == list(range(10))  # five turns a stage
    assert ours["rank"] == 16 and ours["length"] == 2048 and ours["versions"] == {"jax": "1.2"}
    page = (tmp_path / "chips.md").read_text()
    assert page.index("## Chip H200") < page.index("## Other") and "No figure of a chip" not in page
    flops = 4 * 2048 * (32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256)
    assert "Peak of products of matrices: 0.5 TFLOP/s." in page  # 2 * 64**3 / 1e-6
    assert f"| ours bf16 | 10,240 | {flops / 0.2 / 1e12:,.1f} | 50.0% |" in page
    assert "| 1.00 | 200.0 | 200.0 to 200.0 |" in page
    assert "ours bf16 runs at 2.50 times the speed of peft bf16." in page
    assert "| 8B: at least 2 times PEFT's speed | met | 2.50 |" in page
    assert "| 8B: int8 not slower than bfloat16 | **not met** | 0.80 |" in page
    assert "| 8B in bfloat16: at least 14,800 tokens/s on an H200 | **not met** | 10,240.00 |" in page
    assert "| 8B: at least 1.2 times PEFT compiled | not measured |  |" in page
    assert "peft compiled: not run: out of memory." in page and "ours nf4: not run: out of memory." in page
    assert "| ours: 1 row | 16 | 500.0 |" in page
    assert "ours: 1 row runs at 2.00 times the speed of peft: 1 row." in page


def test_what_hangs_or_dies_costs_no_other_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chip, "BUILD", 0.5)
    deeds = {"peft compiled": "hang", "ours nf4": "die"}
    record = chip.run([MATMUL, TRAIN], 2, tmp_path, start=fake(deeds))
    assert measured(record, "train 8b: peft compiled")["not_run"] == "took more than 0 s"
    assert measured(record, "train 8b: ours nf4")["not_run"] == "its process ended with status 3"
    for name in FIRST:
        assert len(measured(record, f"train 8b: {name}")["seconds"]) == 5
    assert len(record.faults()) == 2

    # Again, with nothing but failures: the figures stay, and say that they are of the first run.
    again = chip.run([MATMUL, TRAIN], 2, tmp_path, start=fake(dict.fromkeys(TRAIN.contenders, "fail build")))
    assert len(measured(again, "train 8b: ours bf16")["seconds"]) == 5
    # Only what has no figure yet.
    last = chip.run([MATMUL, TRAIN, DECODE], 2, tmp_path, start=fake({}), missing=True)
    assert last.is_whole(TRAIN) and last.is_whole(DECODE) and not last.faults()
    began = last.content["measurements"]["train 8b: ours bf16"]["run"]
    chip.run([MATMUL, TRAIN, DECODE], 2, tmp_path, start=fake({"ours bf16": "die"}), missing=True)
    assert Record(tmp_path, "Chip H200").content["measurements"]["train 8b: ours bf16"]["run"] == began


def test_the_time_is_watched_and_the_rest_reported(tmp_path: Path) -> None:
    began = time.monotonic()
    seconds = 3.0
    record = chip.run([MATMUL, TRAIN, DECODE], (seconds + chip.CLOSING) / 60, tmp_path, start=fake({"limit": "hang"}))
    assert time.monotonic() - began < seconds + chip.CLOSING
    over = "the time of the run was over"
    assert measured(record, "train 8b: limit")["not_run"] == over
    assert measured(record, "decode 1b: peft: 1 row")["not_run"] == over
    assert len(measured(record, "matmul: matmul")["seconds"]) == 5
    assert f"- limit: not run: {over}." in (tmp_path / "chips.md").read_text()


def test_no_chip_and_no_cuda_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="chip.py measures nothing: JAX finds no GPU or TPU here. Run make bench"):
        chip.run([MATMUL], 1, tmp_path, start=fake({}, jax="cpu"))
    assert not list(tmp_path.iterdir())
    record = chip.run([MATMUL, TRAIN], 1, tmp_path, start=fake({}, torch="cpu"))
    assert measured(record, "train 8b: peft bf16")["not_run"] == "PyTorch sees no CUDA device"
    with pytest.raises(SystemExit, match="no part is named all. Take some of matmul, train 8b, "):
        chip.main(["--parts", "all"])


def test_a_process_that_has_ended_is_not_asked() -> None:
    clock = Clock(30)
    worker = Worker([sys.executable, "-S", "-c", 'print(\'{"failed": "no library"}\')'])
    for _ in range(2):
        with pytest.raises(Failed, match="no library"):
            worker.greet(clock)
    assert worker.process.poll() is not None


def test_every_contender_of_the_plan_has_a_rehearsal() -> None:
    """A word of the plan for chips that the rehearsal lacks would be run there for the first time."""

    def kinds(plan: tuple[Part, ...]) -> set[tuple[str, str]]:
        return {(part.work, re.sub(r"\d+ rows?|\d+ adapters?", "n", name)) for part in plan for name in part.contenders}

    assert kinds(PARTS) == kinds(TINY)
    assert {side_of(name) for part in PARTS for name in part.contenders} == {"jax", "torch"}


def test_the_page_follows_from_the_records(tmp_path: Path) -> None:
    if (ROOT / "docs" / "chips").is_dir():
        shutil.copytree(ROOT / "docs" / "chips", tmp_path / "chips")
    chip_report.write(tmp_path)
    page = (ROOT / "docs" / "chips.md").read_text()
    assert (tmp_path / "chips.md").read_text() == page
    assert ("No figure of a chip is on record yet" in page) != (tmp_path / "chips").is_dir()


SMALL = {"size": "tiny", "rows": 1, "length": 8, "new": 3, "rank": 2, "remat": False}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program's own environment for JAX, as far as a process can have it that has imported JAX."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(
    ("side", "work", "names"),
    [
        ("jax", "matmul", ["matmul"]),
        ("jax", "train", ["limit"]),
        pytest.param("jax", "train", ["ours int4"], marks=pytest.mark.slow),
        pytest.param("torch", "train", ["peft bf16"], marks=pytest.mark.slow),
        ("torch", "decode", ["peft: 2 rows of 2 adapters"]),
    ],
)
def test_contenders_run_here(side: str, work: str, names: list[str], settled: None) -> None:
    if side == "torch":
        pytest.importorskip("torch")
        pytest.importorskip("peft")
    import chip_worker

    one = chip_worker.Side(side, {**SMALL, "work": work, **({"size": "16"} if work == "matmul" else {})})
    assert one.device() == "cpu"
    for name in names:
        facts = one.build(name)
        assert abs(one.run(name)) > 0
        if work == "train" and name != "limit":
            assert 4 < facts["loss"] < 7 and "peak_bytes" in facts  # about ln 256
        if work == "decode":
            assert facts["tokens"] == 4
    assert chip_worker.answered(lambda: {"seconds": one.run("other")}) == {"failed": "KeyError: 'other'"}


BARE = """
import sys
for name in ("jaxtyping", "grain", "matplotlib", "tyro", "jinja2", "torch"):
    sys.modules[name] = None
import chip_worker
print(chip_worker.Side("jax", {}).device(), chip_worker.answered(lambda: chip_worker.Side("torch", {}))["failed"])
from peft_jax.methods.lora.config import LoraConfig
print(LoraConfig.merge.__annotations__["return"])
"""


def test_it_does_without_what_an_image_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    without_torch = "import of torch halted; None in sys.modules"
    assert first in (f"cpu ModuleNotFoundError: {why}" for why in (without_torch, "No module named 'peft'"))
    assert "Array" in second and "Float" not in second  # the stand-in's, without axes
