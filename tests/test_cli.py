"""The command line: what it writes, what each option does, and what a wrong input gets."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from peft_jax.cli import main as main_module
from peft_jax.cli.demo import Demo, Settings, demo, one_of_each, with_shuffled_answers
from peft_jax.cli.demo_data import MODEL, TRAIN
from peft_jax.cli.main import main
from peft_jax.cli.shared.output_folder import new_folder, refuse_used
from peft_jax.models import AutoModelForCausalLM
from peft_jax.models.llama.model import LlamaConfig
from peft_jax.train import Diverged, read_records, train
from peft_jax.train.metrics import read_metrics
from peft_jax.train.run_state import Checkpoints

RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(12)]


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and data."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finetune(**changes: Any) -> list[str]:
    """The words of a short run, with some options changed; an option of value None is left out."""
    options = {"model": "model", "data": "data.json", "output": "out", "max_steps": 3, "batch_size": 2} | changes
    words = ["finetune"]
    for name, value in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    """What a run writes, without its checkpoints, which hold the time of day."""
    return {name: content for name, content in tree(folder).items() if not name.startswith("checkpoints/")}


def trained(capsys: pytest.CaptureFixture[str], **changes: Any) -> dict[str, np.ndarray]:
    """The tensors that a run writes."""
    shutil.rmtree("out", ignore_errors=True)
    assert main(finetune(**changes)) == 0, capsys.readouterr().err
    return load_file("out/adapter_model.safetensors")


def test_a_run_writes_an_adapter_that_peft_loads(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(finetune(output="runs/first")) == 0
    out = workplace / "runs" / "first"
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "loss.png",
        "run.yaml",
        "README.md",
        "checkpoints",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "training_layout.json",
    }
    assert [file.name for file in out.parent.iterdir()] == ["first"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3] and all(np.isfinite(row["loss"]) for row in metrics)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "12 examples. None was too long." in said and "trainable params: " in said and "Training loss" in said
    assert max(map(len, said.splitlines())) <= 100

    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), out)
    written = load_file(out / "adapter_model.safetensors")
    loaded = {name: value for name, value in served.state_dict().items() if "lora_" in name}
    assert len(written) == len(loaded) == 8
    for name, value in loaded.items():
        assert np.array_equal(value.numpy(), written[name.replace(".default", "")])
        assert "lora_A" in name or np.abs(value.numpy()).max() > 0  # B has left zero


@pytest.fixture(scope="module")
def plain_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the short run writes without any change."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(finetune()) == 0
    return results(folder / "out")


def test_the_same_words_give_the_same_bytes(
    workplace: Path, plain_run: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(capsys)
    assert results(Path("out")) == plain_run


@pytest.mark.parametrize(
    "change",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"lora_alpha": 3},
        {"max_steps": 4},
        {"batch_size": 3},
        {"learning_rate": 1e-3},
        {"seed": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_option_is_ignored(
    workplace: Path, plain_run: dict[str, bytes], capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    plain = load(plain_run["adapter_model.safetensors"])
    changed = trained(capsys, **change)
    assert plain.keys() == changed.keys()
    assert any(not np.array_equal(plain[name], changed[name]) for name in plain)


def test_rank_alpha_and_targets_are_written(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = trained(capsys, r=3, lora_alpha=5, target_modules=["k_proj", "down_proj"])
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5, "CAUSAL_LM")
    assert set(config["target_modules"]) == {"k_proj", "down_proj"}
    assert {name.split(".")[-3] for name in tensors} == {"k_proj", "down_proj"}
    assert all(3 in tensor.shape for tensor in tensors.values())
    everything = trained(capsys, target_modules="all-linear")
    assert len({name.split(".")[-3] for name in everything}) == 7


def test_examples_over_the_cutoff_are_counted(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.json").write_text(json.dumps([*RECORDS, {"instruction": "a", "output": "b" * 100}]))
    assert main(finetune(output="one", max_steps=1, cutoff_len=80, long="drop")) == 0
    assert "12 examples. 1 longer than 80 tokens left out.\n" in capsys.readouterr().out
    assert main(finetune(output="two", max_steps=1)) == 0
    assert "13 examples. None was too long.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cutoff_len": 80}, "13 examples. 1 longer than 80 tokens cut to that.\n"),
        ({"cutoff_len": 24}, "1 examples. 1 longer than 24 tokens cut to that. 12 with nothing to learn in that left"),
        ({"cutoff_len": 80, "long": "split"}, "14 examples. 1 longer than 80 tokens split.\n"),
        ({}, "13 examples. 1 longer than 256 tokens cut to that.\n"),
    ],
    ids=["cut", "cut before the answer", "split", "the model's positions"],
)
def test_long_examples_are_cut_or_split_and_counted(
    workplace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    answer = "b" * (400 if not changes else 100)
    Path("data.json").write_text(json.dumps([*RECORDS, {"instruction": "a", "output": answer}]))
    assert main(finetune(output="one", max_steps=1, **changes)) == 0
    assert said in capsys.readouterr().out


def test_the_fields_own_job_in_one_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"finetune --model {MODEL} --data {TRAIN} --output job --load-in-8bit --r 8 --target-modules q_proj v_proj "
        "--batch-size 128 --micro-batch-size 4 --cutoff-len 256 --val-size 0.1 --eval-steps 1 --save-steps 1 "
        "--max-steps 1"
    )
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "2000 examples, 200 of them for validation" in said and "trainable params: 20,480" in said
    assert [row["step"] for row in map(json.loads, Path("job/metrics.jsonl").read_text().splitlines())] == [1, 1]
    assert max(map(len, said.splitlines())) <= 80


def _truncate(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _fewer_tokens(folder: Path) -> None:
    config = LlamaConfig.from_hf(json.loads((folder / "model" / "config.json").read_text()))
    small = dataclasses.replace(config, vocab_size=200)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder / "model")


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _broken_weight(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model" / "model.safetensors")


def _nothing(folder: Path) -> None:
    """Leaves the folder as it is."""


WRONG: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no such model": (_nothing, finetune(model="./modle"), "modle"),
    "a folder without config": (_remove("model/config.json"), finetune(), "config.json"),
    "a folder without weights": (_remove("model/model.safetensors"), finetune(), "safetensors"),
    "a folder without tokenizer": (_remove("model/tokenizer.json"), finetune(), "Put tokenizer.json"),
    "a damaged tokenizer": (_write("model/tokenizer.json", "{"), finetune(), "Put tokenizer.json"),
    "a config that is not JSON": (_write("model/config.json", "{"), finetune(), "config.json"),
    "another architecture": (_write("model/config.json", '{"model_type": "mamba"}'), finetune(), "mamba"),
    "truncated safetensors": (_truncate, finetune(), "model.safetensors"),
    "no such data": (_nothing, finetune(data="none.json"), "no data file at none.json"),
    "data that is a folder": (_nothing, finetune(data="model"), "no data file at model"),
    "empty data": (_write("data.json", ""), finetune(), "is empty. Give"),
    "data without records": (_write("data.json", "[]"), finetune(), "holds no records. Give"),
    "data without the fields": (_write("data.json", '[{"body": "a"}]'), finetune(), "lacks instruction and output"),
    "data over the cutoff": (_nothing, finetune(cutoff_len=8), "Raise --cutoff-len to"),
    "a target that hits nothing": (_nothing, finetune(target_modules="q_porj"), "q_porj"),
    "one of several hits nothing": (_nothing, finetune(target_modules=["q_proj", "q_porj"]), "q_porj"),
    "a rank of nothing": (_nothing, finetune(r=0), "at least 1"),
    "data longer than the positions": (
        _write("data.json", json.dumps([{"instruction": "a", "output": "b" * 300}])),
        finetune(cutoff_len=400),
        "Give --cutoff-len 256",
    ),
    "another model's tokenizer": (_fewer_tokens, finetune(), "the model has 200 tokens"),
    "no steps": (_nothing, finetune(max_steps=0), "--max-steps is 0. Give"),
    "a negative seed": (_nothing, finetune(seed=-1), "--seed is -1. Give"),
    "a rate that diverges": (_nothing, finetune(learning_rate=3e38, output="a/b"), "Lower the learning rate"),
    "an update that is not finite": (
        _nothing,
        finetune(learning_rate=3e38, weight_decay=1e3, max_steps=1),
        "is not finite at step 1. Lower the learning rate",
    ),
    "a weight that is not finite": (_broken_weight, finetune(), "holds NaN or infinity in 1 of"),
    "a validation loss that is not finite": (
        _nothing,
        finetune(learning_rate=3e38, max_steps=1, val_size=2),
        "the validation loss is nan at step 1. Lower",
    ),
    "an output in use": (_write("out/file", "mine"), finetune(), "Name another one with --output"),
    "an output that is a file": (_write("out", "mine"), finetune(), "Name another one with --output"),
    "an output below a file": (_nothing, finetune(output="data.json/a/out"), "data.json is not a folder that you may"),
    "an output that is a broken link": (
        lambda folder: (folder / "out").symlink_to("gone"),
        finetune(),
        "Name another one with --output",
    ),
    "a missing option": (_nothing, finetune(model=None), "--model"),
    "an unknown option": (_nothing, [*finetune(), "--modle", "x"], "--modle"),
    "a word for a number": (_nothing, finetune(r="many"), "--r"),
    "no command": (_nothing, [], "finetune"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    workplace: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, words, said = WRONG[case]
    prepare(workplace)
    before = tree(workplace), sorted(workplace.rglob("*"))
    capfd.readouterr()
    assert main(words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # the bar
    assert len(errors) == 1 and errors[0].startswith("peft-jax: error: ") and said in errors[0], errors
    assert (tree(workplace), sorted(workplace.rglob("*"))) == before


def test_what_was_good_is_kept_when_a_run_diverges(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"val_size": 2, "eval_steps": 1, "max_steps": 4, "save_steps": 100}

    def diverging(*args: Any, **options: Any) -> Any:
        for state, metrics in train(*args, **options):
            yield state, metrics
            if state.step == 2:
                raise Diverged("the loss is nan at step 3", state=state)

    monkeypatch.setattr("peft_jax.cli.finetune.finetune.train", diverging)
    assert main(finetune(**options)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is nan at step 3. Lower the learning rate (--learning-rate) or --max-grad-norm" in said
    assert "of step 2, in out/checkpoints" in said and said.endswith(", in out/best.")
    assert not (workplace / "out" / "adapter_model.safetensors").exists()
    best = load_file(workplace / "out" / "best" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in best.values())
    assert [row["step"] for row in read_metrics(workplace / "out" / "metrics.jsonl")] == [1, 1, 2, 2]
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    restore = Checkpoints.restore

    def broken(self: Checkpoints, like: Any) -> Any:
        state, notes = restore(self, like)
        return state._replace(trainable=jax.tree.map(lambda leaf: leaf * np.nan, state.trainable)), notes

    monkeypatch.setattr(Checkpoints, "restore", broken)
    assert main(finetune(**options, resume=True)) == 2
    assert "the checkpoint out/checkpoints/2 holds NaN or infinity in trainable." in capsys.readouterr().err
    monkeypatch.setattr(Checkpoints, "restore", restore)
    assert main(finetune(**options, resume=True)) == 0


def test_a_run_that_diverges_after_a_checkpoint_names_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(finetune(learning_rate=3e38, save_steps=1)) == 2
    assert "The last checkpoint is that of step 1, in out/checkpoints." in capsys.readouterr().err
    assert len(read_metrics(workplace / "out" / "metrics.jsonl")) == 1


def test_an_evaluation_that_is_not_finite_is_an_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = workplace / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e30
    tensors["lm_head.weight"] *= 1e30
    save_file(tensors, file)
    assert main(["eval", "--model", "model", "--data", "data.json", "--json"]) == 2
    output = capsys.readouterr()
    assert "the loss is nan: what the model computes is not finite" in output.err and not output.out


def test_a_bug_is_one_line_and_its_traceback_is_printed_when_asked_for(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bugs: list[tuple[Exception, int, str]] = [
        (KeyError("a bug"), 1, "KeyError: 'a bug'. This is a defect of peft-jax: report what"),
        (jax.errors.JaxRuntimeError("INTERNAL: a bug."), 1, "JaxRuntimeError: INTERNAL: a bug. This is a defect"),
        (RecursionError(), 1, "RecursionError. This is a defect"),
        (AssertionError("a\nb"), 1, "AssertionError: a b. This is a defect"),
        (MemoryError(), 2, "out of memory. Use smaller batches"),
        (ValueError("wrong. " * 10_000), 2, "wrong. wrong."),
    ]
    for bug, status, said in bugs:

        def broken(options: Any, bug: Exception = bug) -> None:
            raise bug

        monkeypatch.setattr(main_module, "finetune", broken)
        assert main(finetune()) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and len(line) < 1300
        assert main([*finetune(), "--debug"]) == status
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and any("in broken" in one for one in lines)
        assert lines[-1] == line


def test_a_prompt_may_be_spelled_as_the_option_for_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()
    monkeypatch.setattr(main_module, "generate", seen.append)
    assert main(["generate", "--model", "m", "--", "--debug"]) == 0
    assert main(["generate", "--debug", "--model", "m", "a"]) == 0
    assert [one.prompts for one in seen] == [("--debug",), ("a",)]


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_jax.cli.finetune.finetune.make_plan", interrupted)
    before = sorted(workplace.rglob("*"))
    assert main(finetune(output="deep/down/out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "peft-jax: stopped; nothing was written."
    assert sorted(workplace.rglob("*")) == before


COMPILING = """
import jax, jax.numpy as jnp
from peft_jax.cli import main

def slow_to_compile(x):
    for n in range(60):
        x = jnp.sort(x @ x.T + n, axis=n % 2)
    return x

main.demo = lambda options: jax.jit(slow_to_compile)(jnp.ones((8, 8)))
raise SystemExit(main.{function}())
"""


def test_ctrl_c_during_a_compilation_ends_the_process_in_order() -> None:
    """The compilation goes on in a thread, and a process that tears down JAX meanwhile dies of a segmentation fault."""
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    code = COMPILING.format(function=pyproject["project"]["scripts"]["peft-jax"].removeprefix("peft_jax.cli.main:"))
    words = [sys.executable, "-c", code, "demo", "--no-compilation-cache"]
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if "Finished jaxpr to MLIR module conversion jit(slow_to_compile)" in line:
                time.sleep(0.2)  # the compiler starts now and takes seconds
                run.send_signal(signal.SIGINT)
                break
        said = run.stderr.read()
    assert (run.returncode, said.splitlines()[-1]) == (130, "peft-jax: stopped; nothing was written."), said


def test_want_of_memory_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(options: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 27415182424 bytes.")

    monkeypatch.setattr(main_module, "finetune", exhausted)
    assert main(finetune()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Out of memory allocating 27415182424 bytes. Use smaller batches" in line


@pytest.mark.parametrize("name", ["out", "link", "."])
def test_an_empty_folder_is_filled_and_stays_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path / "out" if name == "." else tmp_path)
    before = (tmp_path / "out").stat().st_ino
    with new_folder(Path(name)) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("1")
        assert not (tmp_path / "out" / "a").exists()
    assert tree(tmp_path) == {"out/a/b": b"1"} and len(list((tmp_path / "out").iterdir())) == 1
    assert (tmp_path / "out").stat().st_ino == before and (tmp_path / "link").is_symlink()
    (tmp_path / "out" / "a" / "b").unlink()
    (tmp_path / "out" / "a").rmdir()
    with pytest.raises(KeyError), new_folder(Path(name)) as folder:
        (folder / "a").write_text("1")
        raise KeyError
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_two_commands_do_not_make_one_folder(there: bool, tmp_path: Path) -> None:
    """As two `merge` or two `demo` started at once."""
    output = tmp_path / "out"
    if there:
        output.mkdir()
    with new_folder(output) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(BlockingIOError, match=rf"out is in use by process {os.getpid()} on .* another folder"):
            with new_folder(output):
                raise AssertionError
    assert tree(tmp_path) == {"out/a": b"1"}


MAKES_AND_DIES = """
import os, signal, sys
from pathlib import Path
from peft_jax.cli.shared.output_folder import new_folder

with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_what_a_killed_command_left_is_removed_by_the_next_one(there: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if there:
        output.mkdir()
    run = subprocess.run([sys.executable, "-c", MAKES_AND_DIES, str(output)])
    assert run.returncode == -signal.SIGKILL and [path.name for path in tmp_path.rglob("half")] == ["half"]
    with new_folder(output) as folder:
        (folder / "a").write_text("1")
    assert tree(tmp_path) == {"out/a": b"1"}


def test_a_folder_that_may_not_be_written_to_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(OSError, match=r"out cannot be written: .* you may write to. Name another one with --output"):
        refuse_used(tmp_path / "deep" / "out")


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def full(self: Path, *words: Any, **settings: Any) -> None:
        if self.name.startswith("."):
            raise OSError(28, "No space left on device")
        make(self, *words, **settings)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device. Name"), new_folder(tmp_path / "a/b"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_installed_command_lists_its_commands() -> None:
    command = Path(sys.executable).with_name("peft-jax")
    run = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "finetune" in run.stdout and "demo" in run.stdout and not run.stderr


def test_the_control_keeps_the_form_and_loses_the_content() -> None:
    records = read_records(TRAIN)
    shuffled = with_shuffled_answers(records)
    by_form = {record.instruction for record in records}
    for instruction in by_form:
        one, other = (sorted(r.output for r in rs if r.instruction == instruction) for rs in (records, shuffled))
        assert one == other
    assert [(r.instruction, r.input) for r in shuffled] == [(r.instruction, r.input) for r in records]
    assert np.mean([a.output == b.output for a, b in zip(records, shuffled, strict=True)]) < 0.3
    assert {records[n].instruction for n in one_of_each(records)} == by_form


def test_the_demo_says_what_it_does_and_compiles_each_program_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["peft-jax", "demo"])  # which it quotes where no such command is installed
    short = Settings(max_steps=4, batch_size=4, evaluate_every=2, answer_tokens=3, held_out=8)
    options = main_module.parse(["demo", "--output", "mine"])
    assert isinstance(options, Demo)
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        demo(options, short)
    compiled = [message.split()[1] for message in caplog.messages if message.startswith("Compiling ")]
    assert compiled.count("jit(step)") == 2  # training and evaluation, each for adapter and control
    assert compiled.count("jit(run)") == 1  # generation, before and after
    assert compiled.count("jit(forward)") == 0

    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines() if "demo_data" not in line) <= 80, said
    for part in ("Before", "After", "Control", "before", "after", "wanted", "merged", "finetune --load-in-8bit"):
        assert part in said
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for line in re.findall(r"^(?:Before|After|Control) .*", readme, re.M):
        assert re.sub(r"[\d.]+", "#", line) in re.sub(r"[\d.]+", "#", said), "the README says what the demo prints"
    written = {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"}
    assert written < tree(tmp_path / "mine").keys()
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(FileExistsError, match="--output"):
        demo(options, short)


def test_the_example_runs(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "finetune_in_python.py"))
    example["main"](output=tmp_path / "out", steps=2)
    written = {"adapter/adapter_model.safetensors", "merged/model.safetensors", "loss.png"}
    assert written < tree(tmp_path / "out").keys()
