"""``--streaming``: rows that are read from the disk when a batch needs them."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from peft_jax.cli.main import main
from peft_jax.train import Mixture, Padded, training_batches
from peft_jax.train.data.data_files import read_rows
from peft_jax.train.data.long_examples import Example, NothingFits
from peft_jax.train.data.row_files import GROUPS, JoinedRows, JsonLines, open_rows
from peft_jax.train.data.streamed import AHEAD, ReadAhead, Streamed
from peft_jax.train.metrics import MetricsLog

RECORDS = [{"query": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(40)]
WORDS = (
    "finetune --model model --columns instruction=query --max-steps 12 --batch-size 4 "
    "--val-size 0.2 --eval-steps 4 --save-steps 3 --learning-rate 0.01 --micro-batch-size 2 --cutoff-len 64"
).split()
BOTH = ["--data", "one.jsonl", "--data", "two.jsonl"]
TEXTS: dict[str, bytes] = {
    "plain": b'{"a": 1}\n{"a": 2}\n',
    "no break at the end": b'{"a": 1}\n{"a": 2}',
    "blank lines": b'\n \t\r\n{"a": 1}\n\n\n{"a": 2}\n  \n',
    "a mark at the start": b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n',
    "a list": b'{"a": "' + b"x" * 10**5 + '\u2028\u00e4"}\n{"a": 2}'.encode(),
}


def in_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("case", TEXTS)
def test_lines_are_those_that_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(TEXTS[case])
    for piece in (7, 2**24):
        monkeypatch.setattr("peft_jax.train.data.row_files.PIECE", piece)
        rows = open_rows(file)
        assert [rows[place] for place in range(len(rows))] == read_rows(file) and len(rows) == 2


def write_parquet(file: Path, rows: list[Any], group: int) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file


def test_groups_are_read_as_few_times_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": str(n)} for n in range(100)]
    files = [write_parquet(tmp_path / "a.parquet", rows[:70], 10), write_parquet(tmp_path / "b.parquet", rows[70:], 9)]
    joined = JoinedRows([open_rows(file) for file in files])
    assert [joined[place] for place in range(100)] == rows and joined.blocks == [10] * 7 + [9, 9, 9, 3]
    assert joined.file_of(70) == (1, 0)
    read: list[int] = []
    whole = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self: Any, number: int) -> Any:
        read.append(number)
        return whole(self, number)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    joined = JoinedRows([open_rows(file) for file in files])
    places = np.flatnonzero(np.arange(100) % 5)  # a fifth is kept apart

    def example(place: int) -> Example:
        ids = np.array([int(joined[place]["text"])] * 3, np.int32)
        return Example(ids, ids)

    def numbers(batch: Any) -> list[int]:
        return batch["input_ids"][:, 0].tolist()

    batches = training_batches(Streamed(example, places, joined.blocks, longest=32), 8, seed=3)
    first = [number for step in range(10) for number in numbers(batches[step])]
    assert sorted(first) == places.tolist() and first != places.tolist()
    assert len(read) == len(joined.blocks)
    second = [number for step in range(10, 20) for number in numbers(batches[step])]
    assert sorted(second) == places.tolist() and second != first
    blocks = [np.searchsorted(np.cumsum(joined.blocks), number, side="right") for number in first[:20]]
    assert 1 < len(set(blocks)) <= GROUPS
    again = ReadAhead(training_batches(Streamed(example, places, joined.blocks, longest=32), 8, seed=3))
    for step in (13, 14, 15, 2):  # as a run that goes on
        np.testing.assert_equal(again[step], batches[step])
    other = training_batches(Streamed(example, places, joined.blocks, longest=32), 8, seed=4)
    assert numbers(other[0]) != numbers(batches[0])


def test_rows_of_lines_have_the_order_of_rows_in_memory() -> None:
    examples = [Example(np.full(3, n, np.int32), np.full(3, n, np.int32)) for n in range(30)]
    held = Padded(examples, 32)
    streamed = Streamed(lambda place: examples[place], np.arange(30), None, longest=32)
    mixtures = [Mixture([data, data], (0.25, 0.75)) for data in (held, streamed)]
    for one, other in ((held, streamed), mixtures):
        one, other = training_batches(one, 4, seed=1), ReadAhead(training_batches(other, 4, seed=1))
        for step in range(12):
            np.testing.assert_equal(one[step], other[step])


def test_a_batch_that_is_asked_for_again_is_not_read_again() -> None:
    read: list[int] = []

    def example(place: int) -> Example:
        read.append(place)
        return Example(np.array([place]), np.array([place]))

    ahead = ReadAhead(training_batches(Streamed(example, np.arange(30), None, longest=32), 4, seed=1))
    np.testing.assert_equal(ahead[3], ahead[3])
    assert len(read) <= 4 * (AHEAD + 3) and len(set(read)) == len(read)


def test_a_row_that_is_left_out_gives_its_turn_to_the_next() -> None:
    def read(place: int) -> Example:
        if place != 4:
            raise NothingFits("too long")
        return Example(np.array([place]), np.array([place]))

    assert Streamed(read, np.arange(3, 6), None, longest=32)[2]["input_ids"].tolist() == [4]
    with pytest.raises(NothingFits, match="none of 3 records fits into 32 tokens"):
        Streamed(read, np.arange(3), None, longest=32)[0]


@pytest.fixture
def workplace(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and data."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "one.jsonl").write_text(in_lines(RECORDS[:25]))
    (tmp_path / "two.jsonl").write_text(in_lines(RECORDS[25:]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_streamed_run_that_goes_on_is_one_in_memory(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peft_jax.cli.finetune.streaming.SAMPLE", 8)
    assert main([*WORDS, *BOTH, "--output", "whole"]) == 0
    streamed = [*WORDS, *BOTH, "--output", "out", "--streaming"]
    interrupt(streamed, 5, monkeypatch)
    capsys.readouterr()
    assert main([*streamed, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "40 records, read when they are needed; 8 of them, which are kept in memory, for validation." in said
    assert "Resuming at step 5 of 12." in said
    for name in ("adapter_model.safetensors", "metrics.jsonl", "best/adapter_model.safetensors"):
        assert (workplace / "out" / name).read_bytes() == (workplace / "whole" / name).read_bytes(), name
    with open("two.jsonl", "a") as stream:
        stream.write(in_lines(RECORDS[:1]))
    assert main([*WORDS, *BOTH, "--output", "out", "--streaming", "--resume"]) == 2
    assert "the contents of two.jsonl have changed" in capsys.readouterr().err


def interrupt(words: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that Ctrl-C ends after a step."""
    write = MetricsLog.write

    def interrupted(self: MetricsLog, row: Any) -> None:
        write(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        assert main(words) == 130


@pytest.mark.parametrize(
    "data",
    [
        ["one.parquet", "two.parquet"],
        ["one.parquet@3", "two.jsonl@1"],
        pytest.param(["one.parquet@3", "two.parquet@1"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_stream_of_groups_and_a_mixture_of_streams_go_on_to_the_same_bits(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: list[str]
) -> None:
    monkeypatch.setattr("peft_jax.cli.finetune.streaming.SAMPLE", 4)
    write_parquet(workplace / "one.parquet", RECORDS[:25], 5)
    write_parquet(workplace / "two.parquet", RECORDS[25:], 5)
    run = "finetune --model model --columns instruction=query --batch-size 4 --r 1 --target-modules q_proj --streaming"
    words = [*run.split(), *(word for name in data for word in ("--data", name)), "--learning-rate", "0.01"]
    words += ["--max-steps", "12"]  # an epoch and more, of 5 blocks in one file
    assert main([*words, "--output", "whole"]) == 0
    interrupt([*words, "--output", "out"], 5, monkeypatch)
    capsys.readouterr()
    assert main([*words, "--output", "out", "--resume"]) == 0
    assert "Resuming at step 5 of 12." in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (workplace / "out" / name).read_bytes() == (workplace / "whole" / name).read_bytes(), name


def _nothing(folder: Path) -> None:
    pass


def _list(folder: Path) -> None:
    (folder / "one.jsonl").write_text(json.dumps(RECORDS))


def _other(folder: Path) -> None:
    (folder / "one.jsonl").write_text(in_lines([*RECORDS[:9], {"text": "a text"}]))


def _broken(folder: Path) -> None:
    (folder / "one.jsonl").write_text(in_lines(RECORDS[:9]) + "{\n")


def _bytes(folder: Path) -> None:
    (folder / "one.jsonl").write_bytes(in_lines(RECORDS[:9]).encode() + b'{"query": "\xff"}\n')


def _empty(folder: Path) -> None:
    (folder / "one.jsonl").write_text("\n \n")


def _half(folder: Path) -> None:
    (folder / "one.parquet").write_bytes(write_parquet(folder / "whole.parquet", RECORDS, 4).read_bytes()[:-20])


def _csv(folder: Path) -> None:
    (folder / "one.csv").write_text("question,answer\n1,2\n")


REFUSED: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "packing": (_nothing, ["--packing"], "--packing needs all examples at once, and --streaming reads one at a time."),
    "splitting": (_nothing, ["--long", "split"], "--long split needs all examples at once"),
    "labels": (_nothing, ["--task", "SEQ_CLS"], "--streaming reads no labels of all records, which SEQ_CLS begins"),
    "a list": (_list, [], "one.jsonl is a JSON list, which is read whole. --streaming reads JSONL and Parquet files."),
    "a table": (_csv, ["--data", "one.csv"], "one.csv is a .csv file. --streaming reads JSONL and Parquet files."),
    "no file": (_nothing, ["--data", "none.jsonl"], "no data file at none.jsonl. --streaming reads JSONL and Parquet"),
    "the hub": (_nothing, ["--data", "some/data"], "some/data is a data set on the hub. --streaming reads JSONL and"),
    "more tokens than positions": (_nothing, ["--cutoff-len", "999"], "exceed the model's 256 positions"),
    "an empty file": (_empty, [], "one.jsonl is empty."),
    "half a file": (_half, ["--data", "one.parquet"], "one.parquet is not a whole parquet file"),
    "another form behind the first records": (_other, [], "record 10 of one.jsonl lacks instruction"),
    "no JSON behind the first records": (_broken, [], "one.jsonl is not JSON in record 10, at byte 5"),
    "no text behind the first records": (_bytes, [], "record 10, at byte 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_is_said_in_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, words, said = REFUSED[case]
    prepare(workplace)
    monkeypatch.setattr("peft_jax.cli.finetune.streaming.SAMPLE", 8)
    data = [] if "--data" in words else ["--data", "one.jsonl"]
    assert main([*WORDS, *data, "--streaming", "--output", "out", *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-jax: error: ")]
    assert len(errors) == 1 and said in errors[0], errors
    assert not (workplace / "out" / "adapter_config.json").exists()


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(in_lines(RECORDS))
    rows = JsonLines(file)
    file.write_text(in_lines(RECORDS[1:]))
    with pytest.raises(ValueError, match="data.jsonl was changed while it was read. Start again."):
        rows[0]
