"""The programs that a run most likely needs are compiled while its data are tokenized."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from peft_jax.cli.finetune import setup
from peft_jax.cli.finetune.guess import SAMPLE, guessed_programs, is_worthwhile, sample_of
from peft_jax.cli.main import main
from peft_jax.cli.shared.data_sources import Loaded

ENOUGH = "peft_jax.cli.finetune.guess.ENOUGH"
CACHE = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def cache_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's cache is on, and its settings are as before."""
    before = {name: jax.config.values[name] for name in CACHE}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr("peft_jax.cli.finetune.guess.CORES", 1)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


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
    shutil.copytree(tiny_llama, "model")
    records = [{"prompt": "Count.", "completion": " ".join(map(str, range(n % 24)))} for n in range(2, 50)]
    Path("data.json").write_text(json.dumps(records))
    words = ["finetune", "--model", "model", "--data", "data.json", "--batch-size", "4", "--max-steps", "2"]
    words += ["--val-size", "8"]  # of the whole data; a sample has none
    make_data, name = setup.make_data, ""
    made: list[int] = []

    def slow(task: Any, loaded: Loaded, **others: Any) -> setup.Examples:
        """Behind a sample, all records take until a program is there."""
        made.append(len(loaded.records))
        data = make_data(task, loaded, **others)
        deadline = time.monotonic() + 60
        while len(made) == 2 and kind != "not known without values" and not programs(name):
            assert time.monotonic() < deadline, "nothing was compiled"
            time.sleep(0.01)
        return data

    monkeypatch.setattr(setup, "make_data", slow)
    losses, said, found = [], [], []
    for name, enough in (("guessed", 8), ("alone", 10**9)):
        monkeypatch.setattr(ENOUGH, enough)
        made.clear()
        jax.clear_caches()
        reset_cache()
        with programs_read() as read:
            assert main([*words, *KINDS[kind], "--output", name, "--compilation-cache", f"{name} programs"]) == 0
        assert made == ([SAMPLE, 48] if name == "guessed" else [48])
        losses.append(Path(name, "metrics.jsonl").read_text())
        said.append(capsys.readouterr().out.replace(name, ""))
        found.append(len(read))
    assert losses[0] == losses[1]
    assert said[0] == said[1]
    is_guessed = kind != "not known without values"
    assert found[0] - found[1] >= is_guessed, "the run did not find what was compiled"


@contextmanager
def programs_read() -> Iterator[list[str]]:
    """The programs that come from JAX's cache in a block."""
    read: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            read.append(event)

    jax.monitoring.register_event_listener(listen)
    yield read
    jax.monitoring.unregister_event_listener(listen)


def programs(name: str) -> set[str]:
    """The programs of micro batches in a run's cache."""
    return {file.name for file in Path(f"{name} programs").glob("jit_add-*-cache")}


def test_the_sample_has_the_longest_records() -> None:
    records = ["short"] * 9000
    records[4321] = "a long record" * 9
    sample = sample_of(Loaded(records, (9000,), None, ()))  # type: ignore[arg-type]
    assert len(sample.records) == sum(sample.counts) == SAMPLE
    assert records[4321] in sample.records


def test_few_records_are_not_guessed_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = Loaded(["one"] * 9000, (9000,), None, ())  # type: ignore[list-item]
    jax.config.update("jax_compilation_cache_dir", None)
    assert not is_worthwhile(loaded), "nothing that is compiled would be found again"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert is_worthwhile(loaded)
    assert not is_worthwhile(Loaded(loaded.records[:100], (100,), None, ()))
    monkeypatch.setattr("peft_jax.cli.finetune.guess.CORES", 10**6)
    assert not is_worthwhile(loaded)


def test_what_is_wrong_with_a_sample_is_left_to_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = Loaded(["one"] * 9000, (9000,), None, ())  # type: ignore[list-item]

    def broken(sample: Loaded) -> Any:
        print("of a sample")
        raise ValueError("of a sample")

    assert list(guessed_programs(broken, lambda data: None, loaded)) == []
    assert list(guessed_programs(lambda sample: None, lambda data: None, loaded)) == []  # type: ignore[arg-type, return-value]
    assert capsys.readouterr().out == ""
