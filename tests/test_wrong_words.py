"""Every flag with a wrong value: one line that names the flag; and a way out of what is no flag's fault."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_jax.cli.demo_data import MODEL
from peft_jax.cli.main import COMMANDS, main
from peft_jax.cli.shared.command_line import Parameter, option_groups
from peft_jax.cli.shared.way_out import of_full_disk

WRONG = {int: "x1", float: "y1"}


def flags_of(command: str) -> list[Parameter]:
    """The options of a command that are given by a flag."""
    return [one for _, group in option_groups(COMMANDS[command]) for one in group if one.flags]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a command ends with, which is all that it says on stderr."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peft-jax: error: ")
    return line.removeprefix("peft-jax: error: ")


NEEDED = {
    "finetune": ["--model", "m", "--data", "d", "--output", "o"],
    "generate": ["a prompt"],
    "preview": ["--model", "m", "--data", "d"],
    "eval": ["--data", "d"],
    "merge": ["--adapter", "a", "--output", "o"],
    "inspect": ["a"],
    "demo": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_flag_with_a_wrong_value_is_named_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for one in flags_of(command):
        name = one.flags[0]
        for typed in one.flags:
            if one.type is bool:
                line = error_of([command, f"{typed}=yes", *NEEDED[command]], capsys)
                assert line == f"{name} takes no value. Give the flag alone, or leave it out."
                continue
            line = error_of([command, *NEEDED[command], typed], capsys)
            assert line == f"{name} has no value. Give {one.metavar} behind it."
        if one.choices:
            line = error_of([command, *NEEDED[command], name, "fp17"], capsys)
            assert line == f"{name} is 'fp17'. Give one of {', '.join(one.choices)}."
        elif one.type in WRONG:
            line = error_of([command, *NEEDED[command], name, WRONG[one.type]], capsys)
            assert line.startswith(f"{name} is '{WRONG[one.type]}'. Give a ")
        line = error_of([command, *NEEDED[command], f"{name}x"], capsys)
        assert line.startswith(f"{command} has no option {name}x. Did you mean {name}?")
        assert line.count(name) == 2


FREE = {"lora_alpha"}  # of any size and sign, as in PEFT
OTHERWISE = {  # flags whose numbers are reported in other words
    "temperature": "temperature is above 0",
    "r": "LORA needs ranks of at least 1",
    "lora_dropout": "lora_dropout is a probability",
    "process_id": "--coordinator-address and --num-processes are missing",
    "task_id": "--task-id is -1, but no adapter has several tasks",
}


@pytest.mark.parametrize("command", ["finetune", "generate", "eval"])
def test_each_number_below_0_is_refused_by_its_flag(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "Count.", "output": "1, 2"}] * 4))
    given = {
        "finetune": ["--model", str(MODEL), "--data", str(data), "--output", str(tmp_path / "out")],
        "generate": ["--model", str(MODEL), "Count."],
        "eval": ["--model", str(MODEL), "--data", str(data)],
    }
    for one in flags_of(command):
        if one.type not in WRONG or one.name in FREE:
            continue
        more = ["--do-sample"] if one.name in ("temperature", "top_k", "top_p", "min_p") else []
        line = error_of([command, *given[command], *more, one.flags[0], "-1"], capsys)
        assert OTHERWISE.get(one.name, one.flags[0]) in line, line
        assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_refused_by_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for one in flags_of("generate"):
        if one.type is float:
            line = error_of(["generate", "--model", str(MODEL), "a", "--do-sample", one.flags[0], "nan"], capsys)
            assert line == f"{one.flags[0]} is nan. Give a finite number."


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("message", "cause", "way"),
    [
        ("a file cannot be written", FULL, "Free space on that disk, or name a folder on another one with --output."),
        ("out cannot be written. Name another one with --output.", FULL, "Or free space on that disk."),
        ("The run is saved. Give the same command with --resume to go on.", FULL, "Free space on that disk first;"),
        ("Error: IoError(No space left on device)", None, "Free space on that disk, or"),
        ("Disk quota exceeded", None, "Free space on that disk, or"),
        ("Permission denied", PermissionError(errno.EACCES, "Permission denied"), ""),
    ],
)
def test_a_full_disk_has_a_way_out(message: str, cause: OSError | None, way: str) -> None:
    error = OSError(message)
    error.__cause__ = cause
    found = of_full_disk(error)
    assert found.startswith(way) and bool(found) == bool(way)


def test_a_disk_that_is_full_in_a_run_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_jax.models.handles.peft_model import PeftModel

    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "Count.", "output": "1, 2"}] * 4))

    def full(self: PeftModel, folder: Path, **options: object) -> None:
        raise FULL

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    words = ["finetune", "--model", str(MODEL), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*words, "--max-steps", "1", "--target-modules", "q_proj"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(
        "No space left on device. The run is saved up to step 1. Give the same command with --resume to go on. "
        "Free space on that disk first; --save-total-limit 1 keeps one checkpoint alone."
    )


@pytest.mark.parametrize("platforms", ["cuda", "no-such"])
def test_no_such_device_is_one_line(platforms: str) -> None:
    words = ["generate", "--model", str(MODEL), "a"]
    program = f"import sys; from peft_jax.cli.main import main; sys.exit(main({words!r}))"
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"peft-jax: error: JAX_PLATFORMS is {platforms}, and JAX finds no such device here")
    assert "write JAX_PLATFORMS=cpu" in line


def test_messages_have_the_right_article() -> None:
    from peft_jax.core.articles import article

    assert [article(word) for word in ("OPTForCausalLM", "BertModel", "instruction", "IA3")] == [
        "an OPTForCausalLM",
        "a BertModel",
        "an instruction",
        "an IA3",
    ]
