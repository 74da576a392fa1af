"""The programs that a run most likely needs are compiled while its data are tokenized."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from peft_jax.cli.finetune import setup
from peft_jax.cli.finetune.guess import SAMPLE, guessed, is_worthwhile, sample_of
from peft_jax.cli.main import main
from peft_jax.cli.shared.data_sources import Loaded

ENOUGH = "peft_jax.cli.finetune.guess.ENOUGH"
CORES = "peft_jax.cli.finetune.guess.CORES"
COMPILED = "/jax/core/compile/backend_compile_duration"


KINDS = {
    "packed": [],
    "one text a row": ["--peft", "PREFIX_TUNING"],
    "packed over all data": ["--packing"],
    "not known without values": ["--peft", "ADALORA"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_finds_what_was_compiled_while_its_data_were_tokenized(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CORES, 1)
    shutil.copytree(tiny_llama, "model")
    records = [{"prompt": "Count.", "completion": " ".join(map(str, range(n % 24)))} for n in range(2, 50)]
    Path("data.json").write_text(json.dumps(records))
    words = ["finetune", "--model", "model", "--data", "data.json", "--batch-size", "4", "--max-steps", "2"]
    words += ["--val-size", "8", "--no-compilation-cache"]  # of the whole data; a sample has none
    is_guessed = kind != "not known without values"
    make_data = setup.make_data
    made: list[int] = []  # how many records each call had
    compiled: list[str] = []  # programs of micro batches
    meanwhile: list[int] = []  # how many of them were there when all records were tokenized

    def listen(event: str, _: float, **more: Any) -> None:
        if event == COMPILED and more["fun_name"] == "jit(add)":
            compiled.append(more["fun_name"])

    def slow(task: Any, loaded: Loaded, **others: Any) -> setup.Examples:
        """Behind a sample, all records take until a program is there."""
        made.append(len(loaded.records))
        data = make_data(task, loaded, **others)
        deadline = time.monotonic() + 60
        while len(made) == 2 and is_guessed and not compiled:
            assert time.monotonic() < deadline, "nothing was compiled"
            time.sleep(0.01)
        meanwhile[:] = [len(compiled)]
        return data

    monkeypatch.setattr(setup, "make_data", slow)
    losses, said, later = [], [], []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name, enough in (("guessed", 8), ("alone", 10**9)):
            monkeypatch.setattr(ENOUGH, enough)
            made.clear()
            compiled.clear()
            jax.clear_caches()
            assert main([*words, *KINDS[kind], "--output", name]) == 0
            assert made == ([SAMPLE, 48] if name == "guessed" else [48])
            losses.append(Path(name, "metrics.jsonl").read_text())
            said.append(capsys.readouterr().out.replace(name, ""))
            later.append(len(compiled) - meanwhile[0])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert losses[0] == losses[1]
    assert said[0] == said[1]
    assert later[0] < later[1] if is_guessed else later[0] == later[1], "the run did not find what was compiled"


def test_the_sample_has_the_longest_records() -> None:
    records = ["short"] * 9000
    records[4321] = "a long record" * 9
    sample = sample_of(Loaded(records, (9000,), None, ()))  # type: ignore[arg-type]
    assert len(sample.records) == sum(sample.counts) == SAMPLE
    assert records[4321] in sample.records


def test_few_records_are_not_guessed_of(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(["one"] * 9000, (9000,), None, ())  # type: ignore[list-item]
    monkeypatch.setattr(CORES, 1)
    assert is_worthwhile(loaded)
    assert not is_worthwhile(Loaded(loaded.records[:100], (100,), None, ()))
    monkeypatch.setattr(CORES, 10**6)
    assert not is_worthwhile(loaded)


def test_what_is_wrong_with_a_sample_is_left_to_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = Loaded(["one"] * 9000, (9000,), None, ())  # type: ignore[list-item]

    def broken(sample: Loaded) -> Any:
        print("of a sample")
        raise ValueError("of a sample")

    assert guessed(broken, lambda data: None, loaded) is None
    assert guessed(lambda sample: None, lambda data: None, loaded) is None  # type: ignore[arg-type, return-value]
    assert capsys.readouterr().out == ""
