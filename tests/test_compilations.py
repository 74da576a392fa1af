"""The programs that a run compiles: one for each width that occurs, the first while the weights are read."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from peft_jax.cli import main as command
from peft_jax.cli.finetune.ahead import compiled_meanwhile
from peft_jax.cli.main import main
from peft_jax.cli.shared.compilation_cache import AHEAD

LOGGER = "jax._src.interpreters.pxla"  # JAX names each program there as it is compiled


class Names(logging.Handler):
    """The names of compiled programs, and of those that were compiled ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ahead: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the name in 'Compiling jit(name) with ...'."""
        words = record.getMessage().split()
        if words[0] == "Compiling":
            name = words[1].removeprefix("jit(").removesuffix(")")
            self.found.append(name)
            if threading.current_thread().name == AHEAD:
                self.ahead.add(name)


@pytest.fixture
def compiled() -> Iterator[Names]:
    logger, names = logging.getLogger(LOGGER), Names()
    before = logger.level, logger.propagate
    logger.addHandler(names)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield names
    logger.removeHandler(names)
    logger.level, logger.propagate = before


def test_a_run_compiles_a_program_for_each_width(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Names
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model")
    records = [{"instruction": "Count.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(2, 26)]
    Path("data.json").write_text(json.dumps(records))
    run = ["finetune", "--model", "model", "--data", "data.json", "--batch-size", "4", "--val-size", "4"]
    jax.clear_caches()
    assert main([*run, "--output", "out", "--epochs", "2", "--no-compilation-cache"]) == 0
    named = Counter(compiled.found)
    print(named)
    rows = [json.loads(line) for line in Path("out", "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in rows) == 10 and sum("eval_loss" in row for row in rows) == 2
    assert (named["begin"], named["end"]) == (1, 1), "a step's beginning and its update know no widths"
    assert compiled.ahead >= {"begin", "add", "end"}
    assert named["stage"] <= 1 and 1 <= named["step"] <= 3, "the evaluation, of at most as many widths"
    assert 1 <= named["add"] <= 3 + 2
    assert named.total() <= 28


KINDS = {
    "int8": ["--load-in-8bit"],
    "NF4": ["--load-in-4bit", "--remat"],
    "prompt": ["--peft", "PROMPT_TUNING"],
    "prefix": ["--peft", "PREFIX_TUNING"],
    "packing": ["--packing"],
    "PiSSA": ["--peft-config", '{"init_lora_weights": "pissa"}'],
    "DoRA": ["--peft-config", '{"use_dora": true}'],
    "bfloat16": ["--dtype", "bfloat16", "--compute-dtype", "bfloat16"],
    "an adapter": ["--adapter", "trained"],
    "resumed": ["--resume", "--output", "trained", "--max-steps", "2"],
}
WAITING = {"ADALORA": ["--peft", "ADALORA"]}  # its schedule looks at ranks


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *WAITING])
def test_the_first_step_of_each_kind_is_compiled_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Names, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text(json.dumps([{"text": "one two three"}] * 4))
    run = ["finetune", "--model", str(tiny_llama), "--data", "data.json", "--batch-size", "4", "--no-compilation-cache"]
    more = {**KINDS, **WAITING}[kind]
    if "trained" in more:
        steps = ["--max-steps", "2"] if kind == "resumed" else []
        assert main([*run, "--output", "trained", "--max-steps", "1", *steps]) == 0
    jax.clear_caches()
    compiled.found.clear()
    compiled.ahead.clear()
    assert main([*run, "--output", "out", "--max-steps", "1", *more]) == 0
    named = Counter(compiled.found)
    assert (named["begin"], named["end"]) == (1, 1)
    assert compiled.ahead == ({"begin", "add", "end"} if kind in KINDS else set())


def test_what_is_compiled_ahead_changes_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Any]:
        raise ValueError("of the thread")

    with compiled_meanwhile(broken):
        pass
    begun, finish, compiled = threading.Event(), threading.Event(), []

    class Program:
        def compile(self) -> None:
            begun.set()
            finish.wait(60)
            compiled.append(self)

    def programs() -> Iterator[Any]:
        yield Program()

    for error in (KeyboardInterrupt(), ValueError("of the run")):
        begun.clear()
        finish.clear()
        compiled.clear()
        with pytest.raises(type(error)), compiled_meanwhile(programs):
            begun.wait(60)
            raise error
        assert not compiled, "it is not waited for"
        assert ends_at_once(monkeypatch)
        finish.set()
        while is_ahead():
            time.sleep(0.01)
        assert len(compiled) == 1
        assert not ends_at_once(monkeypatch)


def test_a_process_ends_at_once_whoever_reads_it() -> None:
    code = "import sys; from peft_jax.cli.main import end_at_once; print('a line'); sys.stdin.read(); end_at_once(3)"
    words, settings = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(words, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdout.close()
        run.stdin.close()
        assert run.wait() == 3


def is_ahead() -> bool:
    """Whether a program is being compiled ahead."""
    return any(thread.name == AHEAD for thread in threading.enumerate())


def ends_at_once(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the process of a command that is refused ends without Python's orderly end."""
    codes: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(command, "main", lambda: 2)
        patch.setattr(command, "end_at_once", codes.append)
        with pytest.raises(SystemExit) as ended:  # behind it too, as it does nothing here
            command.run()
    assert ended.value.code == 2 and codes in ([], [2])
    return codes == [2]
