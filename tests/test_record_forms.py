"""Data in the forms that people have: each by its public description, through preview and a step of finetune."""

import gzip
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from peft_jax.cli.command_options import Preview
from peft_jax.cli.main import main
from peft_jax.cli.shared.command_line import option_groups
from peft_jax.cli.shared.data_options import DataFileOptions
from peft_jax.cli.shared.data_sources import load_records
from peft_jax.train import Mixture, Padded, training_batches
from peft_jax.train.data import text_pieces
from peft_jax.train.data.long_examples import IGNORE, Example, kept
from peft_jax.train.data.record_forms import to_records
from peft_jax.train.data.records import Chat, Completion, Record
from peft_jax.train.data.token_rows import token_rows
from peft_jax.train.metrics import MetricsLog

# A template with the parts that the forms have: tools, thoughts and calls.
TEMPLATE = (
    "{% if tools %}T{{ tools[0].function.name }};{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c.function.name }}={{ c.function.arguments.x }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
ASK = {"role": "user", "content": "ask"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}

# Records of each form, and what preview prints of the first one; all of it where a prompt is the chat template's.
FORMS: dict[str, tuple[Any, str]] = {
    "alpaca": ({"instruction": "do", "input": "it", "output": "done"}, "u:do\n\nit</s>a:[[done</s>]]"),
    "alpaca with a system prompt and history": (
        {"instruction": "do", "input": "", "output": "done", "system": "be", "history": [["one", "two"]]},
        "s:be</s>u:one</s>a:two</s>u:do</s>a:[[done</s>]]",
    ),
    "a question": ({"question": "why", "answer": "so"}, "u:why</s>a:[[so</s>]]"),
    "texts to complete": ({"prompt": "one", "completion": " two"}, "<s>one[[ two</s>]]"),
    "chats to complete": (
        {
            "prompt": [ASK, {"role": "assistant", "content": "no"}, ASK],
            "completion": [{"role": "assistant", "content": "yes"}],
        },
        "u:ask</s>a:no</s>u:ask</s>a:[[yes</s>]]",
    ),
    "plain text": ({"text": "all of it"}, "<s>[[all of it</s>]]"),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "be"},
                {"from": "human", "value": "ask"},
                {"from": "gpt", "value": "say"},
            ]
        },
        "s:be</s>u:ask</s>a:[[say</s>]]",
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [
                {"from": "human", "value": "ask"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 7}}'},
                {"from": "observation", "value": "8"},
                {"from": "gpt", "value": "say"},
            ],
            "system": "be",
            "tools": json.dumps([TOOL]),
        },
        "Tf;s:be</s>u:ask</s>a:[[!f=7</s>]]t:8</s>a:[[say</s>]]",
    ),
    "OpenAI with tools and null content": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "8"},
                {"role": "assistant", "content": "say"},
            ],
            "tools": [TOOL],
        },
        "Tf;u:ask</s>a:[[!f=7</s>]]t:8</s>a:[[say</s>]]",
    ),
    "OpenAI's earlier functions": (
        {
            "messages": [ASK, {"role": "assistant", "content": None, "function_call": CALL["function"]}],
            "functions": [TOOL["function"]],
        },
        "Tf;u:ask</s>a:[[!f=7</s>]]",
    ),
    "parts of contents": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "say"}]},
            ]
        },
        "u:ask</s>a:[[say</s>]]",
    ),
    "turns of weight 0": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": "bad", "weight": 0},
                ASK,
                {"role": "assistant", "content": "poor", "train": False},
                ASK,
                {"role": "assistant", "content": "good", "weight": 1},
            ]
        },
        "u:ask</s>a:bad</s>u:ask</s>a:poor</s>u:ask</s>a:[[good</s>]]",
    ),
    "thoughts": (
        {"messages": [ASK, {"role": "assistant", "content": "say", "reasoning_content": "hm"}]},
        "u:ask</s>a:[[(hm)say</s>]]",
    ),
}


@pytest.fixture
def workplace(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model that has a chat template."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], workplace: Path) -> Callable[..., str]:
    """Runs a command, and returns what it prints."""

    def run(*words: str) -> str:
        code = main(words)
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return run


def write(name: str, *records: Any) -> None:
    Path(name).write_text("\n".join(map(json.dumps, records)))


TRAIN = "finetune --model model --output out --max-steps 1 --batch-size 1 --r 1 --target-modules q_proj".split()
PREVIEW = ["preview", "--model", "model"]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_learned_as_it_says(say: Callable[..., str], form: str) -> None:
    record, shown = FORMS[form]
    write("data.jsonl", record)
    said = say(*PREVIEW, "--data", "data.jsonl")
    assert said.partition("\n")[2].startswith(f"{shown}\n"), said
    say(*TRAIN, "--data", "data.jsonl")
    [row] = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert row["tokens"] == int(said.split()[2]) and np.isfinite(row["loss"])


ROWS = [{"query": "a, b", "reply": f'say "{n}"\nand more', "id": str(n)} for n in range(3)]


def tables(folder: Path) -> list[str]:
    """The rows in files of each format."""
    import csv

    write("rows.jsonl", *ROWS)
    Path("rows.json").write_text(json.dumps(ROWS))
    for name, delimiter in {"rows.csv": ",", "rows.tsv": "\t"}.items():
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.Table.from_pylist(ROWS)
    parquet.write_table(table, "rows.parquet")
    for name, new in {"rows.arrow": arrow.ipc.new_file, "stream.arrow": arrow.ipc.new_stream}.items():
        with arrow.OSFile(name, "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    files = sorted(path.name for path in folder.glob("*.*") if path.is_file())
    for name in files:
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    return [*files, *(f"{name}.gz" for name in files)]


def test_all_formats_of_files_hold_the_same(workplace: Path) -> None:
    names = tables(workplace)
    assert len(names) == 14
    wanted = [Record("a, b", "", row["reply"]) for row in ROWS]
    for name in names:
        found = load_records(DataFileOptions(data=(name,), columns=("instruction=query", "output=reply")))
        assert found.records == wanted, name
        assert found.notes == (f"Not used of {name}: id.",)


WRONG_DATA: dict[str, tuple[Any, str]] = {
    "preference": ({"prompt": "a", "completion": "b", "chosen": "c"}, "record 1 .* has a field chosen, which"),
    "a label that is false": ({"prompt": "a", "completion": "b", "label": False}, "has a field label, which"),
    "a system prompt of texts": ({"prompt": "a", "completion": "b", "system": "c"}, "has a field system, which"),
    "tools of texts": ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "has tools and a prompt that is text"),
    "a weight of a record": ({"text": "a", "weight": 0}, "has a field weight, which"),
    "a context": ({"question": "a", "answer": "b", "context": "c"}, "has a field context, which"),
    "a picture": (
        {"messages": [ASK | {"content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]},
        "message 1 in record 1 .* a part of type image, and text alone",
    ),
    "half a weight": ({"messages": [ASK, {"role": "assistant", "content": "a", "weight": 0.5}]}, "has the weight 0.5"),
    "a question that is to be learned": (
        {"messages": [{**ASK, "train": True}, {"role": "assistant", "content": "a"}]},
        "has the train True and the role user, and turns of the assistant alone",
    ),
    "nothing to learn": (
        {"messages": [ASK, {"role": "assistant", "content": "a", "weight": 0}]},
        "no turn of the assistant that is to be learned",
    ),
    "no content": (
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        "message 2 .* lacks a role or a content",
    ),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, ASK, {"role": "assistant", "content": "b"}], "system": "c"},
        "a field system and a turn of role system",
    ),
    "a history of another form": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        "history that is no list of pairs",
    ),
    "turns that are no JSON": ({"conversations": "hi"}, "has text in its turns, which is not JSON"),
    "a field that is null": (
        {"instruction": None, "output": "b"},
        r"lacks instruction; it has instruction \(null\), out",
    ),
    "tools that are no JSON": (
        {"messages": [ASK, {"role": "assistant", "content": "b"}], "tools": "none"},
        "has text in its tools, which is not JSON",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_a_field_that_cannot_be_used_is_refused_by_name(case: str) -> None:
    record, said = WRONG_DATA[case]
    with pytest.raises(ValueError, match=said) as error:
        to_records([record], "data.jsonl")
    assert "\n" not in str(error.value)


def test_tools_that_the_template_does_not_write_are_refused_and_thoughts_reported(
    say: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("model/chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    write("thoughts.jsonl", FORMS["thoughts"][0])
    assert "The chat template does not write reasoning_content, which 1 chats have." in say(
        *PREVIEW, "--data", "thoughts.jsonl"
    )
    turns = [ASK, {"role": "asistant", "content": "a typo"}, ASK, {"role": "assistant", "content": "say"}]
    write("roles.jsonl", {"messages": turns})
    for words in ([], ["--streaming"]):
        said = say(*PREVIEW, "--data", "roles.jsonl", *words)
        assert "Turns of the role asistant are given to the chat template as they are, and not learned." in said
    Path("unnamed.csv").write_text(",text\n0,a\n")
    assert "Not used of unnamed.csv: a column without a name." in say(*PREVIEW, "--data", "unnamed.csv")
    write("tools.jsonl", FORMS["OpenAI with tools and null content"][0])
    assert main([*PREVIEW, "--data", "tools.jsonl"]) == 2
    assert "chat 1 has tools, which the tokenizer's chat template does not write" in capsys.readouterr().err


WRONG_WORDS = {
    "a column that is missing": (
        ["--columns", "output=answer"],
        "rows.jsonl has no column answer; it has query, reply",
    ),
    "no column": (["--columns", "output"], "--columns has 'output'. Give a field and its column"),
    "two columns": (["--columns", "a=b", "a=c"], "two columns for a: b and c"),
    "a weight of nothing": (["--data", "rows.jsonl@0"], "has the weight '0'. Give a number above 0"),
    "a weight that is no number": (["--data", "rows.jsonl@x"], "has the weight 'x'"),
    "one weight": (["--data", "rows.jsonl@2"], "--data rows.jsonl has no weight, and other data has one"),
    "a split of a file": (["--data-split", "test"], "--data-split is for data sets on the hub"),
    "a subset of a file": (["--data-subset", "a"], "--data-subset is for data sets on the hub"),
    "a revision of a file": (["--data-revision", "a"], "--data-revision is for data sets on the hub"),
    "no examples": (["--examples", "0"], "--examples is 0. Give a number above 0"),
    "a folder that is missing": (["--columns", "text=reply", "--html", "none/p.html"], "none/p.html cannot be written"),
    "a truncated file": (["--data", "torn.jsonl.gz"], "torn.jsonl.gz is not a whole gzip file"),
    "a row with too many cells": (["--data", "torn.csv"], "torn.csv has 3 cells in line 2 and 2 columns (a, b). Put"),
    "two columns of a name": (["--data", "twice.csv"], "twice.csv has two columns named 'text'. Rename or remove one"),
    "two of a Parquet file": (["--data", "twice.parquet"], "twice.parquet has two columns named 'text'. Rename or"),
    "two of a stream": (["--data", "twice.parquet", "--streaming"], "twice.parquet has two columns named 'text'."),
    "semicolons": (["--data", "other.csv"], "other.csv has one column, 'text;n'. In a file that ends in .csv commas"),
    "another encoding": (["--data", "latin.csv"], "latin.csv is not UTF-8 text. Save the table as UTF-8."),
    "a folder": (["--data", "model"], "no data file at model, which is a folder. Give"),
}


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words_are_one_line(workplace: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, said = WRONG_WORDS[case]
    write("rows.jsonl", *ROWS)
    Path("torn.jsonl.gz").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes())[:-9])
    Path("torn.csv").write_text("a,b\n1,2,3\n")
    Path("twice.csv").write_text("text,text\na,b\n")
    Path("other.csv").write_text("text;n\na;b\n")
    Path("latin.csv").write_bytes("text\nä\n".encode("latin-1"))
    if "twice.parquet" in words:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_arrays([arrow.array(["a"])] * 2, ["text", "text"]), "twice.parquet")
    first = [] if words[0] == "--data" and "@" not in words[1] else ["--data", "rows.jsonl"]
    assert main([*PREVIEW, *first, *words]) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert said in error


def test_formats_need_their_package(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows.parquet needs the package pyarrow. .*\.\[arrow\]'"):
        load_records(DataFileOptions(data=("rows.parquet",)))


def test_data_sets_on_the_hub_have_a_split_a_subset_and_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake = types.ModuleType("datasets")

    def load_dataset(*names: str, **options: Any) -> list[dict[str, str]]:
        seen.append((names, options))
        return [{"text": "a"}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    load_records(DataFileOptions(data=("me/mine",)))
    load_records(DataFileOptions(data=("me/mine",), data_split="test[:9]", data_subset="en", data_revision="v1"))
    plain: dict[str, Any] = {"trust_remote_code": False}
    assert seen == [
        (("me/mine",), {**plain, "split": "train"}),
        (("me/mine", "en"), {**plain, "split": "test[:9]", "revision": "v1"}),
    ]


def numbered(first: int, count: int) -> Padded:
    """Rows of one token each, by number."""
    ids = [np.array([number, number], np.int32) for number in range(first, first + count)]
    return Padded([Example(row, row) for row in ids])


def test_a_mixture_has_its_shares_and_repeats_the_smaller_part_evenly() -> None:
    batches = training_batches(Mixture([numbered(1, 4), numbered(100, 40)], (0.75, 0.25)), 8, seed=0)
    drawn = np.concatenate([batches[step]["input_ids"][:, 0] for step in range(10)])
    small = drawn[drawn < 100]
    assert len(small) == 60 and np.unique(small, return_counts=True)[1].tolist() == [15] * 4
    assert len(np.unique(drawn[drawn >= 100])) == 20
    again = training_batches(Mixture([numbered(1, 4), numbered(100, 40)], (0.75, 0.25)), 8, seed=0)
    assert np.array_equal(again[7]["input_ids"], batches[7]["input_ids"])


def test_a_mixture_is_resumed_to_the_same_bits(say: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", *({"question": str(n), "answer": "a"} for n in range(3)))
    write("b.jsonl", *({"prompt": str(n), "completion": " b"} for n in range(9)))

    def words(*data: str, out: str) -> list[str]:
        return [*TRAIN, "--max-steps", "4", "--output", out, *(word for name in data for word in ("--data", name))]

    mixed = ("a.jsonl@3", "b.jsonl@1")
    say(*words(*mixed, out="whole"))
    say(*words("a.jsonl", "b.jsonl", out="plain"))
    log = MetricsLog.write

    def interrupted(self: MetricsLog, row: Any) -> None:
        log(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        assert main(words(*mixed, out="part")) == 130
    assert "Resuming at step 2 of 4." in say(*words(*mixed, out="part"), "--resume")
    whole = load_file("whole/adapter_model.safetensors")
    part, plain = load_file("part/adapter_model.safetensors"), load_file("plain/adapter_model.safetensors")
    assert all(np.array_equal(whole[name], part[name]) for name in whole)
    assert any(not np.array_equal(whole[name], plain[name]) for name in whole), "the weights are dead"
    card = Path("whole/README.md").read_text()
    assert "on `a.jsonl@3`, `b.jsonl@1`, in the format" in card


def test_splitting_learns_every_token_once() -> None:
    ids = np.arange(100, 123, dtype=np.int32)
    labels = np.where(np.arange(23) < 5, IGNORE, ids).astype(np.int32)
    found = kept([Example(ids, labels)], 6, "split")
    assert max(example.length for example in found.examples) == 6
    learned = np.concatenate([example.labels[example.labels != IGNORE] for example in found.examples])
    assert learned.tolist() == ids[5:].tolist()
    for example in found.examples:
        assert example.labels[0] == IGNORE
        assert np.all((example.labels == IGNORE) | (example.labels == example.input_ids))


@pytest.mark.parametrize("text", ["one two three " * 999, "x" * 20000, " " * 5000 + "end " * 3000, "é漢\n" * 4000])
def test_of_a_long_text_the_first_tokens_are_those_of_the_whole(tiny_llama: Path, text: str) -> None:
    from peft_jax.cli.demo_data import MODEL
    from peft_jax.prompts.tokenizer import read_tokenizer

    for folder in (tiny_llama, MODEL):
        tokenizer = read_tokenizer(folder)
        [row] = token_rows([text], tokenizer, at_least=50)
        whole = tokenizer(text, verbose=False)["input_ids"]
        assert row.ids[:50] == whole[:50]
        assert not row.is_whole and len(row.ids) < len(whole) / 2


def sentencepiece_tokenizer(splits: bool) -> Any:
    """A tokenizer with marks for spaces, either as one word of a whole text, as Llama 2's, or of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if splits:
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    made.train_from_iterator(["one", "two", "three", "end"], trainer)
    ends = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LONG_TEXTS = {
    "words": "one two three " * 400,
    "a word": "x" * 6000,
    "letters of several bytes": "é漢🎉 end\n\n" * 600,
    "spaces": (" " * 30 + "end ") * 200,
}


@pytest.mark.parametrize("kind", ["bytes", "bytes and BOS", "one word", "words"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from peft_jax.cli.demo_data import MODEL
    from peft_jax.prompts.tokenizer import read_tokenizer

    monkeypatch.setattr(text_pieces, "PIECE", 1000)
    monkeypatch.setattr(text_pieces, "OVERLAP", 700)
    folders = {"bytes": MODEL, "bytes and BOS": tiny_llama}
    tokenizer = read_tokenizer(folders[kind]) if kind in folders else sentencepiece_tokenizer(kind == "words")
    for name, text in LONG_TEXTS.items():
        whole = tokenizer(text, verbose=False)["input_ids"]
        assert text_pieces.ids_of_pieces(text, tokenizer) == whole, name


def test_a_long_text_that_begins_with_no_token_is_tokenized_whole() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, 2] if add_special_tokens else []}

    stand_in: Any = tokenizer
    assert text_pieces.ids_of_pieces(" " * 9000 + "one", stand_in) is None


def test_a_long_text_that_cannot_be_joined_is_tokenized_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_jax.prompts.tokenizer import read_tokenizer

    tokenizer, text = read_tokenizer(tiny_llama), "one two three " * 400
    monkeypatch.setattr("peft_jax.train.data.token_rows.LONG", 1000)
    seen = []

    def no_pieces(text: str, tokenizer: Any) -> None:
        seen.append(text)

    monkeypatch.setattr("peft_jax.train.data.token_rows.ids_of_pieces", no_pieces)
    short, long = token_rows(["one", text], tokenizer)
    assert seen == [text] and long.ids == tokenizer(text, verbose=False)["input_ids"] and len(short.ids) < 5
    monkeypatch.setattr("peft_jax.train.data.token_rows.ids_of_pieces", lambda text, tokenizer: [7])
    assert token_rows(["one", text], tokenizer)[1].ids == [7]


def test_preview_counts_colors_and_writes_a_page(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<b>\x1b[31m é漢"
    write("data.jsonl", {"prompt": "one", "completion": evil}, {"prompt": "two " * 50, "completion": "x"})
    words = [*PREVIEW, "--data", "data.jsonl", "--examples", "1", "--cutoff-len", "40", "--html", "p.html"]
    said = say(*words)
    assert "Example 2" not in said and "[[<b>\\x1b[31m é漢</s>]]" in said
    assert "1 examples of" in said and "1 with nothing to learn in that left out." in said and "Wrote p.html." in said
    text = Path("p.html").read_text()
    assert "<b>" not in text and "&lt;" in text and "<span class=learned>" in text and "\x1b" not in text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[30;42m" in say(*words)
    everything = say(*words, "--train-on-inputs")
    assert int(everything.partition(" tokens, ")[2].split()[0]) > int(said.partition(" tokens, ")[2].split()[0])


def test_preview_of_classes_reads_the_label(say: Callable[..., str]) -> None:
    Path("data.csv").write_text("text,label\none,1\ntwo,0\n")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    words = [*PREVIEW, "--data", "data.csv", "--task", "SEQ_CLS"]
    assert "tokens, class LABEL_1\n" in say(*words)
    assert "tokens, class good\n" in say(*words, "--label-names", "bad", "good")


def test_preview_of_a_stream_reads_its_first_records(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("peft_jax.cli.finetune.streaming.SAMPLE", 2)
    write("data.jsonl", *({"prompt": "say", "completion": str(n)} for n in range(5)))
    words = [*PREVIEW, "--data", "data.jsonl"]
    said = say(*words, "--streaming")
    assert "[[1</s>]]" in said and "[[2</s>]]" not in said and "[[2</s>]]" in say(*words)
    assert "5 records, read when they are needed. Of the first 2:\n2 examples of" in said
    for more, error in {
        "--long split": "--long split needs all examples at once",
        "--task SEQ_CLS": "--streaming reads no labels of all records, which SEQ_CLS begins with",
        "--label-names a b": "--label-names is for classes, and CAUSAL_LM has none",
    }.items():
        assert main([*words, "--streaming", *more.split()]) == 2
        assert error in capsys.readouterr().err


# Of each option of preview: other words, words that have it, and what is shown with it alone.
PAIRS = "--data pairs.jsonl"
WORDS = "--data words.jsonl --task TOKEN_CLS --cutoff-len 6 --long split"
SHOWN_BY: dict[str, tuple[str, str, str]] = {
    "data": (PAIRS, "--data more.jsonl", "3 examples of"),
    "columns": (PAIRS, "--columns completion=other", "[[third</s>]]"),
    "data_split": ("--data me/mine", "--data-split test", "'split': 'test'"),
    "data_subset": ("--data me/mine", "--data-subset en", "'en'"),
    "data_revision": ("--data me/mine", "--data-revision v1", "'revision': 'v1'"),
    "prompt_template": ("--data alpaca.jsonl", "--prompt-template alpaca", "Below is an instruction"),
    "cutoff_len": (PAIRS, "--cutoff-len 7", "longer than 7 tokens cut to that"),
    "long": (f"{PAIRS} --cutoff-len 7", "--long drop", "1 longer than 7 tokens left out"),
    "stride": (WORDS, "--stride 2", "5 examples of"),
    "model": (PAIRS, "--model other", "No folder 'other'"),
    "gguf_file": (PAIRS, "--gguf-file none.gguf", "none.gguf"),
    "task": ("--data classes.jsonl", "--task SEQ_CLS", "class LABEL_1"),
    "problem_type": ("--data classes.jsonl --task SEQ_CLS", "--problem-type regression", "class LABEL_0=1"),
    "label_names": ("--data classes.jsonl --task SEQ_CLS", "--label-names bad good", "class good"),
    "train_on_inputs": (PAIRS, "--train-on-inputs", "[[one second</s>]]"),
    "streaming": (PAIRS, "--streaming", "2 records, read when they are needed"),
    "examples": (f"{PAIRS} --examples 1", "--examples 2", "Example 2"),
    "html": (PAIRS, "--html page.html", "Wrote page.html."),
}
ROWS_OF: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"prompt": "one", "completion": " second", "other": "third"},
        {"prompt": "a", "completion": "b", "other": ""},
    ],
    "more": [{"prompt": "one", "completion": "more"}],
    "alpaca": [{"instruction": "do", "output": "done"}],
    "words": [{"tokens": ["a", "b", "c", "d", "e", "f", "g", "h"], "tags": [0, 1, 0, 1, 0, 1, 0, 1]}],
    "classes": [{"text": "one", "label": 1}, {"text": "two", "label": 0}],
}


def test_no_option_of_preview_is_left_out() -> None:
    options = {one.name for _, group in option_groups(Preview) for one in group}
    assert options == set(SHOWN_BY)


@pytest.mark.parametrize("option", SHOWN_BY)
def test_no_option_of_preview_is_ignored(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *names, **options: [{"text": str((names, options))}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for name, rows in ROWS_OF.items():
        write(f"{name}.jsonl", *rows)
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    words, more, shown = SHOWN_BY[option]
    main([*PREVIEW, *words.split()])
    before = capsys.readouterr()
    main([*PREVIEW, *words.split(), *more.split()])
    after = capsys.readouterr()
    assert shown not in before.out + before.err and shown in after.out + after.err, after


TRAINED_AND_MEASURED = {
    "finetune": TRAIN,
    "eval": ["eval", "--model", "model"],
}
HUB = ("--data", "me/mine")
REACHED_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "columns": (("--data", "pairs.jsonl", "--columns", "completion=none"), "pairs.jsonl has no column none"),
    "data_split": ((*HUB, "--data-split", "test"), "'split': 'test'"),
    "data_subset": ((*HUB, "--data-subset", "en"), "('me/mine', 'en')"),
    "data_revision": ((*HUB, "--data-revision", "v1"), "'revision': 'v1'"),
    "stride": (("--data", "pairs.jsonl", "--stride", "2"), "--stride is for QUESTION_ANS and TOKEN_CLS"),
}


@pytest.mark.parametrize("option", REACHED_BY)
@pytest.mark.parametrize("command", TRAINED_AND_MEASURED)
def test_finetune_and_eval_read_data_as_preview_does(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, option: str
) -> None:
    def load_dataset(*names: str, **options: Any) -> Any:
        raise ValueError(f"{names} {options}")

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    write("pairs.jsonl", *ROWS_OF["pairs"])
    words, said = REACHED_BY[option]
    assert main([*TRAINED_AND_MEASURED[command], *words]) == 2
    assert said in capsys.readouterr().err


def test_types_of_records() -> None:
    [chat] = to_records([FORMS["turns of weight 0"][0]], "here")
    assert isinstance(chat, Chat) and chat.given == (1, 3)
    assert not any({"weight", "train"} & message.keys() for message in chat.messages)
    assert to_records([{"prompt": "a", "completion": "b", "text": "ab"}], "here") == [Completion("a", "b")]
