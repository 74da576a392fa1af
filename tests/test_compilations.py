"""The programs that a run compiles: one for each width that occurs, and no more as it goes on."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from peft_jax.cli.main import main

LOGGER = "jax._src.interpreters.pxla"  # JAX names each program there as it is compiled


class Names(logging.Handler):
    """The names of compiled programs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the name in 'Compiling jit(name) with ...'."""
        words = record.getMessage().split()
        if words[0] == "Compiling":
            self.found.append(words[1].removeprefix("jit(").removesuffix(")"))


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
    assert named["stage"] <= 1 and 1 <= named["step"] <= 3, "the evaluation, of at most as many widths"
    assert 1 <= named["add"] <= 3 + 2
    assert named.total() <= 28
