"""Two processes that train together on one machine, and what one process makes of their checkpoints."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick_compilation
from safetensors.numpy import load_file

from peft_jax.cli.main import main

RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(24)]
WORDS = (
    "finetune --model model --data data.json --load-in-8bit --packing --cutoff-len 64 --max-steps 6 --batch-size 8 "
    "--micro-batch-size 4 --val-size 4 --eval-steps 2 --save-steps 3 --learning-rate 0.01 --lora-dropout 0.1"
).split()
MESH = "fsdp=2,tensor=2"  # the first axis goes across the processes
LAST, MIDDLE = "6", "3"  # checkpoints


# What Gloo's threads say as they connect, each in pieces, which may lie on one another's lines.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def together(words: Sequence[Sequence[str]], *, by_flags: bool = True) -> list[tuple[int, str, str]]:
    """Run a process of two devices for each list of words; their exit codes and what they print."""
    runs = started(words, by_flags=by_flags)
    said = [run.communicate(timeout=120) for run in runs]
    out = ["\n".join(line for line in text.splitlines() if GLOO.sub("", line)) for text, _ in said]
    return [(run.returncode, text, errors) for run, text, (_, errors) in zip(runs, out, said, strict=True)]


def started(words: Sequence[Sequence[str]], *, by_flags: bool = True) -> list["subprocess.Popen[str]"]:
    """Start a process of two devices for each list of words."""
    address, runs = f"localhost:{free_port()}", []
    for number, own in enumerate(words):
        told = {"coordinator-address": address, "num-processes": str(len(words)), "process-id": str(number)}
        flags = [word for name, value in told.items() for word in (f"--{name}", value)] if by_flags else []
        named = {} if by_flags else {f"JAX_{name.upper().replace('-', '_')}": value for name, value in told.items()}
        command = [sys.executable, "-c", "from peft_jax.cli.main import run; run()", *own, *flags]
        env = {**os.environ, **quick_compilation.environment(devices=2), **named, "JAX_PLATFORMS": "cpu"}
        runs.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return runs


def stopped_halfway(source: str, target: str) -> None:
    """Copy a run as it was after the checkpoint in the middle."""
    shutil.copytree(source, target)
    shutil.rmtree(Path(target, "checkpoints", LAST))


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run ``one`` of one process, one ``two`` of two, and both halves of them swapped."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--output", "one"]) == 0
        words = [*WORDS, "--output", "two", "--mesh", MESH]
        (first, second) = together([words, words])
        assert first[0] == second[0] == 0, (first, second)
        assert "Wrote the adapter" in first[1] and not second[1]
        stopped_halfway("two", "two-one")
        assert main([*WORDS, "--output", "two-one", "--resume"]) == 0
        stopped_halfway("one", "one-two")
        words = [*WORDS, "--output", "one-two", "--resume", "--mesh", MESH]
        (first, second) = together([words, words], by_flags=False)
        assert first[0] == second[0] == 0, (first, second)
        assert f"Resuming at step {MIDDLE} of {LAST}." in first[1] and not second[1]
    return folder


def results(run: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The tensors of both adapters that a run writes, and its metrics."""
    files = [run / name / "adapter_model.safetensors" for name in ("", "best")]
    tensors = {f"{n} {name}": array for n, file in enumerate(files) for name, array in load_file(file).items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, rows


def test_a_killed_process_leaves_the_other_with_one_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model")
    Path("data.json").write_text(json.dumps(RECORDS))
    words = [*WORDS, "--max-steps", "2000", "--output", "out", "--mesh", MESH]
    runs = started([words, words])
    while not Path("out", "checkpoints", MIDDLE).exists():
        assert runs[0].poll() is None
        time.sleep(0.05)
    runs[1].kill()
    runs[1].communicate()
    _, errors = runs[0].communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert runs[0].returncode == 2, errors
    assert last.startswith("peft-jax: error: another process of the run ended, or cannot be reached: ")
    assert last.endswith("start all of them again, with --resume if there is a checkpoint.")
    assert "stack trace" not in errors and Path("out", "checkpoints", MIDDLE).is_dir()


FATAL = "F1129 18:26:07.654868 24998 client.h:80] Terminating: the JAX distributed service detected fatal errors. X"
WATCHED = """
import ctypes, os, sys, threading, time
from peft_jax.cli.finetune.lost_service import service_watched

watched = threading.Event()

def dies():
    watched.wait()
    os.write(2, b"W1 a warning\\n" + b"{fatal}\\nMore.\\n*** stack trace: ***\\n")
    ctypes.CDLL(None).abort()  # unlike os.abort it leaves Python to the other threads

threading.Thread(target=dies, daemon=True).start() if {lost} else None
with service_watched("peft-jax: error: the line"):
    print("before", file=sys.stderr)
    watched.set()
    {block}
"""
LOST: dict[str, tuple[bool, str, int, str, str]] = {
    "nothing happens": (False, "pass", 0, "before\nat the end\n", "print('at the end', file=sys.stderr)"),
    "the main thread waits": (True, "time.sleep(60)", 2, "W1 a warning\npeft-jax: error: the line\n", ""),
    "the main thread reports": (
        True,
        "time.sleep(0.5); print('peft-jax: error: its own', file=sys.stderr); time.sleep(60)",
        2,
        "W1 a warning\npeft-jax: error: its own\n",
        "",
    ),
    "an error behind which the service may end": (
        False,
        "raise SystemExit(os.write(2, b'peft-jax: error: its own\\n') and 2)",
        2,
        "before\npeft-jax: error: its own\n",
        "",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="JAX aborts there")
@pytest.mark.parametrize("case", LOST)
def test_a_process_whose_service_is_lost_ends_with_one_line(case: str) -> None:
    lost, block, code, said, rest = LOST[case]
    program = WATCHED.format(fatal=FATAL, lost=lost, block=block) + rest
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert run.returncode == code, run
    lines = [line for line in run.stderr.splitlines(keepends=True) if not lost or line != "before\n"]
    assert "".join(lines) == said
    assert time.monotonic() - start < 40


@pytest.mark.parametrize("run", ["two", "two-one", "one-two"])
def test_two_processes_end_in_the_numbers_of_one(folder: Path, run: str) -> None:
    wanted, wanted_rows = results(folder / "one")
    found, rows = results(folder / run)
    assert len(found) == 2 * 2 * 4 and found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        assert "lora_B" not in name or np.abs(array).max() > 1e-2
    assert len(rows) == len(wanted_rows) == 6 + 3
    for row, other in zip(rows, wanted_rows, strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-5)


def test_the_folder_of_a_run_is_that_of_one_process(folder: Path) -> None:
    def files(run: str) -> set[str]:
        found = {str(file.relative_to(folder / run)) for file in (folder / run).rglob("*") if file.is_file()}
        return {name for name in found if not name.startswith("checkpoints")}

    assert files("one") == files("two") == files("one-two")
    assert {file.name for file in (folder / "two" / "checkpoints").iterdir()} == {MIDDLE, LAST}


def test_one_process_that_cannot_start_stops_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr("peft_jax.cli.finetune.processes.in_any", lambda said: True)
    assert main([*WORDS, "--output", "new"]) == 2
    assert "peft-jax: error: another process of the run cannot start. See what it says." in capsys.readouterr().err
    assert main([*WORDS, "--output", "new", "--data", "none.json"]) == 2
    assert "peft-jax: error: no data file at none.json" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


HERE = ["--coordinator-address", "localhost:1", "--num-processes", "2", "--process-id", "1"]
WRONG: dict[str, tuple[dict[str, str], list[str], str]] = {
    "no coordinator": ({}, HERE[2:], "--coordinator-address is missing. Processes find each other by flags"),
    "no number": ({}, HERE[:2], "--num-processes and --process-id are missing"),
    "half an environment": ({"JAX_PROCESS_ID": "1"}, [], "--coordinator-address and --num-processes are missing"),
    "a word for a number": ({"JAX_NUM_PROCESSES": "two"}, [], "JAX_NUM_PROCESSES is 'two'. Give a whole number"),
    "no port": ({}, [*HERE, "--coordinator-address", "localhost"], "Give address and port, such as 10.0.0.1:1234"),
    "a number too high": ({}, [*HERE, "--process-id", "2"], "--process-id is 2 of 2 processes. Give 0 to 1"),
    "no processes": ({}, [*HERE, "--num-processes", "0"], "--num-processes is 0. Give a number above 0"),
    "nobody there": ({}, [*HERE, "--initialization-timeout", "1"], "no process 0 answers at localhost:1 within 1 s"),
    "no cluster": ({}, ["--distributed"], "cannot be joined at what the environment tells"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_joined_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    variables, words, said = WRONG[case]
    monkeypatch.chdir(folder)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    assert main([*WORDS, "--output", "new", *words]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("peft-jax: error: ") and said in errors[0], errors
    assert not (folder / "new").exists()


@pytest.mark.parametrize("by", ["flags", "the cluster"])
def test_what_finds_the_others_reaches_jax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    seen = []

    def stop(**options: Any) -> None:
        seen.append(options)
        raise RuntimeError("no")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.distributed.initialize", stop)
    found: dict[str, Any] = {"coordinator_address": "localhost:7", "num_processes": 3, "process_id": 0}
    words = [word for name, value in found.items() for word in (f"--{name}", str(value))]
    if by == "the cluster":
        words, found = ["--distributed"], dict.fromkeys(found)
    assert main([*WORDS, "--output", "new", "--initialization-timeout", "9", *words]) == 2
    assert "the processes of the run cannot be joined" in capsys.readouterr().err
    assert seen == [{**found, "initialization_timeout": 9}]


def test_devices_that_are_left_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_jax.cli.finetune.processes import check_processes
    from peft_jax.train.mesh import make_mesh

    monkeypatch.setattr("jax.process_count", lambda: 2)
    check_processes(make_mesh({"data": 8}))
    with pytest.raises(ValueError, match="2 processes have 8 devices, but the mesh has 4. Give a mesh of all, such as"):
        check_processes(make_mesh({"data": 4}))
    with pytest.raises(ValueError, match="8 devices, but no --mesh was given. Give a mesh of all, such as --mesh data"):
        check_processes(None)
