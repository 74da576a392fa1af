"""Instruction data: what is read, what is trained, and in which order."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tokenizer
from peft_jax.interop.checkpoint import read_config
from transformers import AutoTokenizer

from peft_jax import PeftConfig
from peft_jax.cli.finetune.adapter_config import make_config
from peft_jax.cli.finetune.options import AdapterOptions
from peft_jax.train import (
    Padded,
    Record,
    encode,
    evaluation_batches,
    load_template,
    read_records,
    tokenize_prompts,
    training_batches,
)
from peft_jax.train.data.encode import IGNORE

RECORDS = [
    Record("Reverse the word.", "abc", "cba"),
    Record("Say hello.", "", "hello"),
    Record("Say nothing.", "", ""),
]


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, bos=request.param)
    return AutoTokenizer.from_pretrained(folder)


def test_json_and_jsonl_read_the_same(tmp_path: Path) -> None:
    objects = [{"instruction": r.instruction, "input": r.input, "output": r.output, "id": 7} for r in RECORDS]
    objects[1].pop("input")
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(objects, indent=2), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, objects)) + "\n", encoding="utf-8")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == RECORDS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty. Give at least one record"),
        ("[]", "holds no records. Give at least one"),
        ("[1, 2", "is not JSON"),
        ('{"instruction": "a", "output": "b"}\nhello', "is not JSON in line 2"),
        ("[3]", "record 1 of .* is of type int, not an object"),
        ('[{"instruction": "a", "output": "b"}, {"text": "a", "title": "b"}]', "record 2 .* lacks .* has text, title"),
        ('{"instruction": "a", "response": "b"}', "record 1 of .* lacks output; it has instruction, response"),
        ("{}", "it has no fields"),
        ('{"instruction": "a", "output": ["b"]}', "has an output of type list, not text"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_unreadable_data_says_where_and_what(tmp_path: Path, content: str | bytes, said: str) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        read_records(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data file at"):
        read_records(tmp_path / "none.json")


def test_data_of_another_format_is_not_read_as_instructions(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"prompt": "a", "completion": "b"}]')
    with pytest.raises(ValueError, match="have prompt and completion, not instruction and output. Read .* read_data"):
        read_records(tmp_path / "data.json")


def test_prompt_is_the_short_one() -> None:
    assert RECORDS[0].prompt == "### Instruction:\nReverse the word.\n\n### Input:\nabc\n\n### Response:\n"
    assert RECORDS[1].prompt == "### Instruction:\nSay hello.\n\n### Response:\n"


def rows_of(records: Sequence[Record], tokenizer: Any) -> Padded:
    """The records as rows, of which none is too long."""
    examples, too_long = encode(records, tokenizer, cutoff_len=256)
    assert too_long == 0
    return Padded(examples)


def test_only_the_answer_and_eos_are_trained(tokenizer: Any) -> None:
    data = rows_of(RECORDS, tokenizer)
    assert data.lengths[-1] % 32 == 0
    for row, record in zip(data, RECORDS, strict=True):  # type: ignore[call-overload]
        ids = row["input_ids"][row["attention_mask"] == 1].tolist()
        starts_with_bos = bool(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
        assert ids.count(tokenizer.bos_token_id) == starts_with_bos
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == record.prompt + record.output
        targets = row["labels"][row["labels"] != IGNORE].tolist()
        assert targets == ids[-len(targets) :]
        assert tokenizer.decode(targets) == record.output + "</s>"


def test_a_token_that_straddles_prompt_and_answer_is_trained() -> None:
    def merging(text: str, *, verbose: bool) -> dict[str, list[int]]:
        pairs = text.replace("\nb", "\x01")  # "\nb" is one token
        return {"input_ids": [ord(c) for c in pairs]}

    merging.eos_token_id = 2  # type: ignore[attr-defined]
    [example], _ = encode([Record("a", "", "bc")], merging, cutoff_len=256)
    assert [label for label in example.labels if label != IGNORE] == [1, ord("c"), 2]


def test_eos_is_not_doubled(tokenizer: Any) -> None:
    class AddsEos:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, *, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], self.eos_token_id]}

    [batch] = evaluation_batches(rows_of(RECORDS, AddsEos()), 3)
    [wanted] = evaluation_batches(rows_of(RECORDS, tokenizer), 3)
    for field in ("input_ids", "labels", "attention_mask"):
        assert np.array_equal(batch[field], wanted[field])
    for left, right in zip(tokenize_prompts(RECORDS, AddsEos()), tokenize_prompts(RECORDS, tokenizer), strict=True):
        assert np.array_equal(left, right)


def test_examples_over_the_cutoff_are_counted(tokenizer: Any) -> None:
    records = [*RECORDS, Record("a", "b" * 300, "c")]
    assert encode(records, tokenizer, cutoff_len=128).too_long == 1
    assert len(encode(records, tokenizer, cutoff_len=128).examples) == 3
    exact = encode(RECORDS[:1], tokenizer, cutoff_len=128).examples[0].length
    assert Padded(encode(RECORDS[:1], tokenizer, cutoff_len=exact).examples, exact).lengths[-1] == exact
    with pytest.raises(ValueError, match=f"none of 1 examples fits .* Raise cutoff_len to {exact} or"):
        encode(RECORDS[:1], tokenizer, cutoff_len=exact - 1)


def test_batches_of_one_length(tokenizer: Any) -> None:
    examples, too_long = encode([*RECORDS, Record("a", "b" * 300, "c")], tokenizer, cutoff_len=64)
    data = Padded(examples, 64, shortest=64)
    assert too_long == 1
    assert [batch["input_ids"].shape for batch in evaluation_batches(data, 3)] == [(3, 64)]
    short = Padded(examples[1:2], 96, shortest=96)  # longer than any example needs
    assert [batch["labels"].shape for batch in evaluation_batches(short, 1)] == [(1, 96)]
    assert Padded(examples[1:2], shortest=96).lengths == (96,)
    with pytest.raises(ValueError, match="the smallest length of batches is 0. Give 1 or more"):
        Padded(examples, shortest=0)


def test_a_tokenizer_without_eos_is_an_error(tokenizer: Any) -> None:
    class NoEos:
        eos_token_id = None
        __call__ = tokenizer.__call__

    with pytest.raises(ValueError, match="no eos_token"):
        encode(RECORDS, NoEos(), cutoff_len=256)


def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins(tokenizer: Any) -> None:
    data = rows_of(RECORDS, tokenizer)
    for ids, mask, row in zip(*tokenize_prompts(RECORDS, tokenizer), data, strict=True):  # type: ignore[call-overload]
        assert np.all(np.diff(mask) >= 0)
        prompt = row["input_ids"][(row["attention_mask"] == 1) & (row["labels"] == IGNORE)]
        assert np.array_equal(ids[mask == 1], prompt)


def test_training_batches_shuffle_each_epoch_and_repeat(tokenizer: Any) -> None:
    data = rows_of([Record(f"number {n}", "", str(n)) for n in range(10)], tokenizer)
    batches = training_batches(data, 4, seed=1)
    epoch = [0, 1, 2], [3, 4, 5]  # batches of 4, 4 and 2
    rows = [tuple(ids) for steps in epoch for ids in itertools.chain(*(batches[n]["input_ids"] for n in steps))]
    assert all(np.all(batches[n]["labels"][2:] == IGNORE) and not np.any(batches[n]["input_ids"][2:]) for n in (2, 5))
    rows = rows[:10] + rows[12:22]
    assert (
        set(rows[:10])
        == set(rows[10:])
        == {tuple(ids) for batch in evaluation_batches(data, 1) for ids in batch["input_ids"]}
    )
    assert rows[:10] != rows[10:]
    again, other = training_batches(data, 4, seed=1), training_batches(data, 4, seed=2)
    assert np.array_equal(batches[3]["labels"], again[3]["labels"])
    assert not np.array_equal(batches[3]["labels"], other[3]["labels"])


def test_evaluation_batches_hold_everything_once(tokenizer: Any) -> None:
    examples, _ = encode(RECORDS, tokenizer, cutoff_len=256)
    data = Padded(examples, 96, shortest=96)
    batches = list(evaluation_batches(data, 2))
    assert {batch["labels"].shape for batch in batches} == {(2, 96)}
    labels = list(itertools.chain.from_iterable(batch["labels"] for batch in batches))
    for found, example in zip(labels, examples, strict=False):
        assert np.array_equal(found[: example.length], example.labels) and np.all(found[example.length :] == IGNORE)
    assert len(labels) == 4 and np.all(labels[3] == IGNORE)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a checkpoint's config": ("config.json", lambda file: read_config(file.parent)),
    "an adapter's config": ("adapter_config.json", lambda file: PeftConfig.from_pretrained(file.parent)),
    "the file of --adapter-config": ("mine.json", lambda file: make_config(AdapterOptions(adapter_config=file))),
    "the file of --peft-config": ("mine.json", lambda file: make_config(AdapterOptions(peft_config=str(file)))),
    "a prompt template": ("mine.json", load_template),
}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text."),
        (b"{", "is not JSON ("),
        (b"[]", "is not a JSON object but list."),
        (b"[1]", "is not a JSON object but list."),
        (b"3", "is not a JSON object but int."),
    ],
    ids=["not text", "not JSON", "an empty list", "a list", "a number"],
)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_a_json_object_says_the_same(tmp_path: Path, reader: str, content: bytes, said: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
