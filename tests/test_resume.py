"""Runs that are killed, stopped or refused, and what is left of them."""

import errno
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import quick_compilation
from killed_runs import KINDS

from peft_jax.cli.finetune import setup
from peft_jax.cli.finetune.run_folder import MARKER
from peft_jax.cli.finetune.setup import _sample
from peft_jax.cli.main import main
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.train.metrics import MetricsLog
from peft_jax.train.run_state import Checkpoints

RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(22)]
WORDS = "finetune --model model --data data.json --max-steps 4 --batch-size 4 --output out".split()


def results(folder: Path) -> dict[str, bytes]:
    """What a run writes, without its checkpoints, which hold the time of day."""
    files = [file for file in folder.rglob("*") if file.is_file() and "checkpoints" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and data."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def killed(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[Path, dict[str, list[int]]]:
    """A folder with runs that were killed and resumed, and their exit codes; with ``--slow`` at all moments."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    script = Path(__file__).with_name("killed_runs.py")
    settings = {**os.environ, **quick_compilation.environment()}
    kind = "all" if pytestconfig.getoption("--slow") else "few"
    seeds = [str(seed) for seed in range(1, pytestconfig.getoption("--kills") + 1)]
    run = subprocess.run([sys.executable, script, folder, kind, *seeds], capture_output=True, text=True, env=settings)
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def test_a_run_killed_at_every_bad_moment_ends_in_the_same_bits(
    killed: tuple[Path, dict[str, list[int]]], pytestconfig: pytest.Config
) -> None:
    folder, codes = killed
    chosen, early = (9, 4) if pytestconfig.getoption("--slow") else (4, 1)
    kills = {name: len(found) - 1 for name, found in codes.items() if not name.startswith("random-")}
    assert kills.items() >= {"whole": 0, "chosen": chosen, "early": early}.items()
    for name, (*killed_runs, last) in codes.items():
        assert set(killed_runs) <= {-signal.SIGKILL} and last == 0, name
    whole = results(folder / "whole")
    wanted = {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "README.md"}
    wanted.add("run.yaml")
    beside = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "training_layout.json"}
    best = {"adapter_model.safetensors", "adapter_config.json", *beside}
    assert whole.keys() == wanted | beside | {f"best/{name}" for name in best}
    assert results(folder / "chosen") == whole
    assert sorted(file.name for file in (folder / "chosen" / "checkpoints").iterdir()) == ["12", "14"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_of_each_kind_ends_in_the_same_bits(killed: tuple[Path, dict[str, list[int]]], kind: str) -> None:
    folder, codes = killed
    assert codes[kind] == [-signal.SIGKILL, 0]
    whole = results(folder / f"whole-{kind}")
    assert whole["adapter_model.safetensors"] != results(folder / "whole")["adapter_model.safetensors"]
    assert results(folder / kind) == whole


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(killed: tuple[Path, dict[str, list[int]]]) -> None:
    assert results(killed[0] / "early") == results(killed[0] / "whole")
    said = (killed[0] / "early--resume.log").read_text()
    assert "The run in early ended before its first checkpoint: it starts afresh" in said


def test_a_run_killed_at_a_random_moment_ends_in_the_same_bits(killed: tuple[Path, dict[str, list[int]]]) -> None:
    runs = sorted(killed[0].glob("random-*[0-9]"))
    assert runs
    for run in runs:
        assert results(run) == results(killed[0] / "whole"), run.name


@pytest.mark.slow
def test_a_killed_process_of_two_ends_the_other_and_both_go_on_in_equal_bits(
    tiny_llama: Path, tmp_path: Path, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    settings = {**os.environ, **quick_compilation.environment(), "JAX_PLATFORMS": "cpu"}
    seeds = [str(seed) for seed in range(1, pytestconfig.getoption("--killed-pairs") + 1)]
    script = Path(__file__).with_name("killed_pairs.py")
    run = subprocess.run([sys.executable, script, tmp_path, *seeds], stdout=subprocess.PIPE, text=True, env=settings)
    assert run.returncode == 0
    found = json.loads(run.stdout)
    wanted = results(tmp_path / "whole-pair")
    assert "adapter_model.safetensors" in wanted
    slowest, count, late = 0.0, 0, 0
    for name, runs in found.items():
        *killed, end = runs
        if name == "whole-pair":
            killed = []
        assert end["killed"] == end["other"] == 0, (name, end)
        for one in killed:
            count += 1
            if name.startswith("random") and one["other"] == 0:  # all was written, and the processes were leaving
                assert one["has_adapter"] and one["killed"] in (0, -signal.SIGKILL), (name, one)
                late += 1
                continue
            assert one["killed"] == -signal.SIGKILL and one["other"] == 2 and one["seconds"] < 60, (name, one)
            assert one["line"].startswith("peft-jax: error: another process of the run ended, or cannot be reached: ")
            assert one["line"].endswith("start all of them again, with --resume if there is a checkpoint."), one
            slowest = max(slowest, one["seconds"])
        assert results(tmp_path / name) == wanted, name
    assert count == len(seeds) + 14
    with capfd.disabled():
        ends = f"{late} of them behind the end; the other ended within {slowest:.1f} s"
        print(f"{count} kills of one process of two, {ends}.")


def test_ctrl_c_saves_and_says_how_to_resume(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--output", "whole"]) == 0
    write = MetricsLog.write

    def interrupted(self: MetricsLog, row: Any) -> None:
        write(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        assert main(WORDS) == 130
    said = capsys.readouterr()
    wanted = "peft-jax: stopped. The run is saved up to step 2. Give the same command with --resume to go on."
    assert said.err.splitlines()[-1] == wanted
    bars = [len(part) for part in re.split("[\r\n]", said.err) if "%|" in part]
    assert bars and max(bars) + len("^C") < 80
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (workplace / "out" / "adapter_config.json").exists()
    assert main([*WORDS, "--resume"]) == 0
    assert "Resuming at step 2 of 4." in capsys.readouterr().out
    assert results(Path("out")) == results(Path("whole"))
    assert main([*WORDS, "--resume"]) == 0  # of a run that is done: writes the same again
    assert results(Path("out")) == results(Path("whole"))


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run in ``out``."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(WORDS) == 0
    return folder


@pytest.fixture
def stage(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the current folder."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    yield tmp_path / "copy"


OTHERS: dict[str, tuple[list[str], list[str]]] = {
    "a rate": (["--learning-rate", "0.1"], ["--learning-rate was 0.0003, is 0.1"]),
    "several": (["--r", "4", "--packing"], ["--r was not given, is 4", "--packing was False, is True"]),
    "steps": (["--max-steps", "5"], ["--max-steps was 4, is 5"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_settings_are_named(stage: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, said = OTHERS[case]
    before = results(Path("out"))
    assert main([*WORDS, "--resume", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and all(one in error for one in said) and "another --output" in error
    assert results(Path("out")) == before


def test_other_data_is_noticed(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.json").write_text(json.dumps([*RECORDS[:-1], {"instruction": "a", "output": "b"}]))
    assert main([*WORDS, "--resume"]) == 2
    assert "the contents of data.json have changed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_base_is_noticed(stage: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content = Path("model", name).read_bytes()
    Path("model", name).write_bytes(content[:-1] + (b" " if name == "config.json" else bytes([content[-1] ^ 1])))
    assert main([*WORDS, "--resume"]) == 2
    assert f"the contents of model/{name} have changed" in capsys.readouterr().err


def test_another_version_of_what_a_method_depends_on_is_noticed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PSOFT's frozen arrays have the signs of PyTorch's singular vectors, or of NumPy's."""
    words = [*WORDS, "--peft", "PSOFT", "--r", "4"]
    assert main([*words, "--save-steps", "2"]) == 0
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another" if name == "numpy" else version(name))
    capsys.readouterr()
    assert main([*words, "--save-steps", "2", "--resume"]) == 2
    assert "the contents of the package numpy have changed" in capsys.readouterr().err


def test_other_weights_are_noticed_in_files_too_long_to_be_read_whole(tmp_path: Path) -> None:
    file, found = tmp_path / "weights", []
    for content in (bytes(2**23), bytes(2**23 + 1), b"\1" + bytes(2**23 - 1), bytes(2**23 - 1) + b"\1"):
        file.write_bytes(content)
        found.append(_sample(file))
    file.write_bytes(np.random.default_rng(0).permutation(2**23).astype(np.uint8).tobytes())
    assert len({*found, _sample(file)}) == 5


def test_options_that_change_no_number_may_differ(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, checkpoints = results(Path("out")), Path("out/checkpoints")
    for step in "23":  # as of a run that was killed before it removed them
        shutil.copytree(checkpoints / "4", checkpoints / step)
    assert main([*WORDS, "--resume", "--save-total-limit", "1", "--tensorboard"]) == 0, capsys.readouterr().err
    assert before.items() <= results(Path("out")).items()
    assert [file.name for file in checkpoints.iterdir()] == ["4"]


def _without_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "out" / "checkpoints")


def _with_torn_checkpoint(folder: Path) -> None:
    for file in (folder / "out" / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def _with_short_metrics(folder: Path) -> None:
    (folder / "out" / "metrics.jsonl").write_text("")


def _with_a_damaged_note(folder: Path) -> None:
    (folder / "out" / "checkpoints" / "4" / "files.json").unlink()
    file = folder / "out" / "checkpoints" / "4" / "notes" / "metadata"
    file.write_text(re.sub(r'"metrics_bytes": (\d)', r'"metrics_bytes": 1\1', file.read_text()))


def _with_other_metrics(folder: Path) -> None:
    file = folder / "out" / "metrics.jsonl"
    file.write_bytes(re.sub(rb'"loss": \d', b'"loss": 9', file.read_bytes()))


def _begun(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    (folder / "out").mkdir()
    (folder / "out" / MARKER).write_text("process 1")


def _other_folder(folder: Path) -> None:
    (folder / "none").mkdir()
    (folder / "none" / "letter.txt").write_text("dear")


def _empty_folder(folder: Path) -> None:
    (folder / "none").mkdir()


def _as_it_is(folder: Path) -> None:
    """Leaves the folder alone."""


REFUSED = {
    "no checkpoint": (_without_checkpoints, ["--resume"], "Remove out and start without --resume"),
    "no run": (_as_it_is, ["--resume", "--output", "none"], "no checkpoint in none/checkpoints"),
    "a run in the way": (_as_it_is, [], "already holds a run. Give the same command with --resume to go on"),
    "a damaged checkpoint": (_with_torn_checkpoint, ["--resume"], "out/checkpoints/4 is damaged"),
    "a folder of another kind": (_other_folder, ["--resume", "--output", "none"], "Check --output."),
    "an empty folder": (_empty_folder, ["--resume", "--output", "none"], "or start without --resume"),
    "a run that had just begun": (_begun, [], "Give the same command with --resume to start it afresh"),
    "a damaged note": (_with_a_damaged_note, ["--resume"], "its notes are not those that were saved"),
    "other metrics": (_with_other_metrics, ["--resume"], "are not those that it had when the checkpoint was saved"),
    "metrics cut off": (_with_short_metrics, ["--resume"], "Restore the file"),
}


def kept(folder: Path) -> tuple[dict[str, bytes], list[Path]]:
    """All that is in a folder, but for who last held the marker."""
    found = results(folder)
    found.pop(f"out/{MARKER}", None)
    return found, sorted(folder.rglob("*"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_says_so(stage: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    prepare, words, said = REFUSED[case]
    prepare(stage)
    before = kept(stage)
    capfd.readouterr()
    assert main([*WORDS, *words]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("peft-jax: error: ") and said in errors[0], errors
    assert kept(stage) == before


def test_a_full_disk_keeps_what_was_saved(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save, limits = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: Checkpoints, state: Any, notes: Any) -> None:
        if state.step == 4:  # no file may grow beyond a few bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            save(self, state, notes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        assert main([*WORDS, "--save-steps", "2"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint of step 4 cannot be written to out/checkpoints: " in error
    assert "The run is saved up to step 2. Give the same command with --resume to go on." in error
    assert [file.name for file in Path("out/checkpoints").iterdir()] == ["2"]
    assert main([*WORDS, "--save-steps", "2", "--resume"]) == 0


def test_too_little_room_for_a_checkpoint_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**18))
    assert main(WORDS) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-jax: error: the checkpoint of step 4 cannot be written to out/checkpoints: ")
    assert "No space left on device" in error and not Path("out").exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_model_is_read(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(CausalLM, "__init__", None)
    assert main(WORDS) == 2
    error = capsys.readouterr().err.strip()
    assert error == "peft-jax: error: out cannot be written: Permission denied. Name another one with --output."
    assert not Path("out").exists()


def test_two_runs_do_not_write_to_one_folder(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second command as the first one has just made the folder, and one that resumes what it is still writing."""
    fingerprint, write, codes = setup.fingerprint, MetricsLog.write, []

    def early(options: Any, config: Any) -> dict[str, Any]:
        monkeypatch.setattr(setup, "fingerprint", fingerprint)
        codes.append(main(WORDS))
        return fingerprint(options, config)

    def late(self: MetricsLog, row: Any) -> None:
        if row["step"] == 4:
            monkeypatch.setattr(MetricsLog, "write", write)
            codes.append(main([*WORDS, "--save-steps", "2", "--resume"]))
        write(self, row)

    monkeypatch.setattr(setup, "fingerprint", early)
    monkeypatch.setattr(MetricsLog, "write", late)
    assert main([*WORDS, "--save-steps", "2"]) == 0
    assert codes == [2, 2]
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    me = f"process {os.getpid()} on {re.escape(socket.gethostname())}"
    wanted = rf"peft-jax: error: out is in use by {me} since [-\d]+ [:\d]+ \S+\. Wait for its end or stop it, or name"
    assert len(errors) == 2 and all(re.search(wanted, line) for line in errors), errors
    assert not (workplace / "out" / MARKER).exists()


EVA = ["--peft-config", '{"init_lora_weights": "eva"}', "--start-batches", "2"]


def test_what_a_killed_run_left_is_not_taken_up(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a start, half a checkpoint, metrics and a best adapter; a file of the user's stays."""
    assert main([*WORDS, *EVA, "--output", "whole"]) == 0
    left = ["start/adapter_config.json", "best/adapter_config.json", "metrics.jsonl", "tensorboard/events", MARKER]
    for name in [*left, "checkpoints/4.orbax-checkpoint-tmp/state/d/0", "letter.txt"]:
        Path("out", name).parent.mkdir(parents=True, exist_ok=True)
        Path("out", name).write_text("left")
    capsys.readouterr()
    assert main([*WORDS, *EVA, "--resume"]) == 0
    assert "The run in out ended before its first checkpoint: it starts afresh" in capsys.readouterr().out
    found = results(Path("out"))
    assert found.pop("letter.txt") == b"left"
    assert found == results(Path("whole"))
    # The start is read by a run that goes on, so it is verified too.
    file = Path("out/start/adapter_model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main([*WORDS, *EVA, "--resume"]) == 2
    assert "the contents of start/adapter_model.safetensors have changed" in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    assert main([*WORDS, "--data", "none.json"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"peft-jax: the file system of out has no locks ({os.strerror(errno.ENOLCK)})")
    assert "no data file at none.json" in second and not Path("out").exists()
