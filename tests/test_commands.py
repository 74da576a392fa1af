"""The commands that use an adapter, against PyTorch: generate, eval and merge."""

import dataclasses
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax.cli.generate import generate
from peft_jax.cli.generate.generate import up_to_end
from peft_jax.cli.generate.printer import Printer
from peft_jax.cli.generate.prompt_input import encode, pad, read_prompts, render
from peft_jax.cli.main import main
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.quant import NF4
from peft_jax.train import Record, tokenize_prompts

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
PROMPTS = ["Reverse the word.", "Say a number.", "日本 é"]
RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}" * n} for n in range(1, 8)]


@pytest.fixture(scope="session")
def adapted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (with a chat template) and an adapter that PEFT made, which changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = "model"
    with warnings.catch_warnings(action="ignore"):  # PEFT's, which looks for the base's config where the name says
        model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def workplace(tmp_path: Path, adapted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with model, adapter and data, and a terminal as standard input."""
    shutil.copytree(adapted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    return tmp_path


@pytest.fixture
def run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command that must succeed, and returns what it prints."""

    def words(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return words


@pytest.fixture(scope="module")
def torch_model(adapted: Path) -> Callable[..., Any]:
    """A function that loads the PyTorch model, with or without the adapter."""

    def load(adapter: bool = True, model: str = "model", **options: Any) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(adapted / model, **options)
        return (PeftModel.from_pretrained(base, adapted / "adapter") if adapter else base).eval()

    return load


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def continued(model: Any, tokenizer: Any, text: str, **options: Any) -> str:
    """What PyTorch's model says after a text, greedily."""
    import torch

    ids = torch.tensor([tokenizer(text, **options)["input_ids"]])
    with torch.no_grad():
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))


# ---------------------------------------------------------------- generate


@pytest.mark.filterwarnings("ignore")
def test_generate_says_what_pytorch_says(
    run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path
) -> None:
    tokenizer, model, seen = tokenizer_of(workplace / "model"), torch_model(True), set()
    texts = {
        "short": [Record(instruction=prompt, input="", output="").prompt for prompt in PROMPTS],
        "chat": [f"<user>{prompt}<assistant>" for prompt in PROMPTS],
    }
    for template, prompts in texts.items():
        want = [continued(model, tokenizer, text, add_special_tokens=template != "chat") for text in prompts]
        words = ["generate", "--adapter", "adapter", "--prompt-template", template, "--max-new-tokens", "8"]
        found = [json.loads(line) for line in run(*words, "--json", *PROMPTS).splitlines()]
        assert [one["text"] for one in found] == want
        assert [one["prompt"] for one in found] == PROMPTS
        seen.add(want[0])
    assert len(seen) == 2, "the template is dead"
    assert run(*words, PROMPTS[2]) == want[2] + "\n", "streamed"
    base = continued(torch_model(False), tokenizer, PROMPTS[0])
    said = run("generate", "--model", "model", "--prompt-template", "raw", "--max-new-tokens", "8", PROMPTS[0])
    assert said == base + "\n" and base not in seen, "the adapter is dead"


def test_several_answers_have_numbers_and_titles(run: Callable[..., str]) -> None:
    long = "word " * 40
    said = run("generate", "--adapter", "adapter", "--max-new-tokens", "2", "one\nline", long).splitlines()
    assert said[0] == "[1] one line" and said.count("") >= 1
    assert any(line.startswith("[2] word word") and line.endswith("...") and len(line) <= 80 for line in said)


class Calls:
    """Stands for the model's `generate`: keeps what it is called with, and says the same tokens each time."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.made = tokens, list[tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]]()

    def __call__(self, model: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
        self.made.append((model, ids, mask, options))
        new = np.tile(np.array(self.tokens, np.int32), (len(ids), 1))
        for token in new.T if "streamer" in options else ():
            options["streamer"].put(token)
        return np.concatenate([ids, new], axis=1)

    def fill(
        self, model: Any, prompts: Sequence[list[int]], options: GenerateOptions, rows: int, key: jax.Array
    ) -> Iterator[list[int]]:
        """Stands for `fill_rows`: one call with all prompts."""
        ids, mask = pad(prompts, len(prompts), max(map(len, prompts)))
        for row in self(model, ids, mask, **dataclasses.asdict(options), key=key, rows=rows)[:, ids.shape[1] :]:
            yield up_to_end(row.tolist(), options.eos_token_ids)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the command asks of the model."""
    made = Calls([40, 41, 42])
    monkeypatch.setattr(CausalLM, "generate", lambda model, ids, mask, **options: made(model, ids, mask, **options))
    monkeypatch.setattr(generate, "fill_rows", made.fill)
    return made


def asked(calls: Calls, *words: str, prompts: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    """The options of the one call that a command makes."""
    calls.made.clear()
    assert main(["generate", "--adapter", "adapter", *words, *prompts]) == 0
    return calls.made[0][3]


def asked_of_base(calls: Calls, model: str) -> dict[str, Any]:
    """`asked` of a model without an adapter."""
    calls.made.clear()
    assert main(["generate", "--model", model, "a"]) == 0
    return calls.made[0][3]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max-new-tokens", "7"], "max_new_tokens", 7),
        (["--do-sample"], "do_sample", True),
        (["--do-sample", "--temperature", "0.5"], "temperature", 0.5),
        (["--do-sample", "--top-k", "3"], "top_k", 3),
        (["--do-sample", "--top-k", "0"], "top_k", 0),
        (["--do-sample", "--top-p", "0.5"], "top_p", 0.5),
        (["--do-sample", "--min-p", "0.5"], "min_p", 0.5),
        (["--repetition-penalty", "1.5"], "repetition_penalty", 1.5),
        (["--stop-token", "a", "--stop-token", "<s>", "--stop-token", "\n"], "eos_token_id", None),
    ],
)
def test_choices_reach_the_model(workplace: Path, calls: Calls, words: list[str], name: str, value: Any) -> None:
    plain, given = asked(calls), asked(calls, *words)
    if name == "eos_token_id":
        known = tokenizer_of(workplace / "model").get_vocab()
        value = (1, *(known[word] for word in ("a", "<s>", "Ċ")))
    assert given[name] == value != plain[name]


def test_the_defaults_are_greedy_and_leave_room(workplace: Path, calls: Calls) -> None:
    plain = asked(calls)
    positions, length = 256, int(calls.made[0][2].sum())
    assert plain["do_sample"] is False and plain["eos_token_id"] == (1,) and plain["generation_config"] == {}
    assert plain["max_new_tokens"] == positions - length


@pytest.mark.parametrize(
    ("fields", "words", "expected"),
    [
        ({"max_new_tokens": 9}, [], {"max_new_tokens": 9}),
        ({"max_new_tokens": 9}, ["--max-new-tokens", "5"], {"max_new_tokens": 5}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            [],
            {"do_sample": True, "temperature": 0.6, "top_k": 50},
        ),
        ({"do_sample": True, "temperature": 0.6}, ["--temperature", "0.2"], {"do_sample": True, "temperature": 0.2}),
        ({"do_sample": True, "temperature": 0.6}, ["--greedy"], {"do_sample": False, "temperature": None}),
        ({"do_sample": True, "num_beams": 3}, ["--ignore-generation-config"], {"do_sample": False}),
        ({"eos_token_id": [1, 5]}, ["--stop-token", "a"], {"eos_token_id": (1, 5, 66)}),
    ],
)
def test_generation_config_is_heeded_and_the_command_line_goes_first(
    workplace: Path, calls: Calls, fields: dict[str, Any], words: list[str], expected: dict[str, Any]
) -> None:
    (workplace / "model" / "generation_config.json").write_text(json.dumps(fields))
    given = asked(calls, *words)
    if "eos_token_id" in expected:
        expected["eos_token_id"] = (1, 5, tokenizer_of(workplace / "model").get_vocab()["a"])
    assert {name: given[name] for name in expected} == expected


def test_an_answer_ends_where_the_adapter_learned_it_and_where_the_checkpoint_says(
    workplace: Path, calls: Calls, run: Callable[..., str]
) -> None:
    """The tokenizer ends a text with 1, and the config with 5; the merged checkpoint knows both, as in transformers."""
    file = workplace / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))
    (workplace / "model" / "generation_config.json").unlink(missing_ok=True)
    assert tokenizer_of(workplace / "model").eos_token_id == 1
    assert asked(calls)["eos_token_id"] == (1, 5)
    assert asked(calls, "--ignore-generation-config")["eos_token_id"] == (1,)
    assert asked_of_base(calls, "model")["eos_token_id"] == (5,)
    run("merge", "--adapter", "adapter", "--model", "model", "--output", "merged")
    assert json.loads(Path("merged/config.json").read_text())["eos_token_id"] == 1
    assert json.loads(Path("merged/generation_config.json").read_text())["eos_token_id"] == [1, 5]
    assert asked_of_base(calls, "merged")["eos_token_id"] == (1, 5)


def test_a_null_end_in_generation_config_is_none(workplace: Path, calls: Calls) -> None:
    """Of the base; an adapter's answers end as they were taught."""
    (workplace / "model" / "generation_config.json").write_text('{"eos_token_id": null}')
    assert asked_of_base(calls, "model")["eos_token_id"] == ()
    assert asked(calls)["eos_token_id"] == (1,)


def test_a_field_of_generation_config_that_is_null_is_not_set(workplace: Path, calls: Calls) -> None:
    plain = asked(calls)
    (workplace / "model" / "generation_config.json").write_text('{"max_new_tokens": null, "max_length": null}')
    assert asked(calls)["max_new_tokens"] == plain["max_new_tokens"] > 20


def test_the_model_gets_all_options_at_once(workplace: Path, calls: Calls) -> None:
    (workplace / "model" / "generation_config.json").write_text('{"pad_token_id": 7}')
    given = asked(calls)
    names = {field.name for field in dataclasses.fields(GenerateOptions)}
    assert given.keys() - {"key", "streamer", "generation_config"} == names and given["pad_token_id"] == 7


def test_max_length_counts_the_prompt_without_its_padding(workplace: Path, calls: Calls) -> None:
    (workplace / "model" / "generation_config.json").write_text('{"max_length": 100}')
    given = asked(calls)
    assert given["max_new_tokens"] == 100 - int(calls.made[0][2].sum())


def test_seed_and_batches(workplace: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ("a", "longer " * 9, "b", "c", "d")
    first = [jax.random.key_data(asked(calls, "--seed", seed)["key"]).tolist() for seed in ("0", "1", "1")]
    assert first[0] != first[1] == first[2]
    assert asked(calls, "--batch-size", "2", prompts=prompts)["rows"] == 2 and len(calls.made) == 1
    monkeypatch.setattr(generate, "can_fill", lambda *_: False)
    asked(calls, "--batch-size", "2", prompts=prompts)
    shapes, keys = {call[1].shape for call in calls.made}, [call[3]["key"] for call in calls.made]
    assert len(calls.made) == 3 and len(shapes) == 1 and shapes.pop()[0] == 2, "one shape, hence one program"
    assert len({str(jax.random.key_data(key)) for key in keys}) == 3
    asked(calls, prompts=prompts)
    assert len(calls.made) == 1 and calls.made[0][1].shape[0] == 5


def test_base_element_type_and_int8(workplace: Path, calls: Calls, adapted: Path) -> None:
    def kernel(*words: str) -> Any:
        asked(calls, *words)
        return calls.made[0][0].unload().params["model"]["layers"]["mlp"]["up_proj"]["kernel"]

    assert kernel().dtype == jnp.float32 and kernel("--dtype", "bfloat16").dtype == jnp.bfloat16
    assert kernel("--load-in-8bit").q.dtype == jnp.int8
    assert isinstance(kernel("--load-in-4bit"), NF4)
    shutil.move("model", "elsewhere")
    assert kernel("--model", "elsewhere").dtype == jnp.float32


def test_compute_dtype_is_the_adapters(workplace: Path, calls: Calls) -> None:
    for words, dtype in (((), None), (("--compute-dtype", "bfloat16"), jnp.dtype("bfloat16"))):
        asked(calls, *words)
        assert {leaf.compute_dtype for _, leaf in adapted_leaves(calls.made[0][0])} == {dtype}


def test_answers_end_where_they_stop(run: Callable[..., str], calls: Calls, workplace: Path) -> None:
    known = {number: word for word, number in tokenizer_of(workplace / "model").get_vocab().items()}
    words = ["generate", "--model", "model", "--json"]
    for stop, tokens, reason in ((41, 2, "stop"), (50, 3, "length")):
        found = json.loads(run(*words, "--stop-token", known[stop], "a"))
        assert (found["tokens"], found["finish_reason"]) == (tokens, reason)


def test_prompts_come_from_words_files_and_standard_input(
    workplace: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(workplace / "model")

    def texts(*words: str, template: str = "raw") -> list[str]:
        calls.made.clear()
        assert main(["generate", "--model", "model", "--prompt-template", template, *words]) == 0
        _, ids, mask, _ = calls.made[0]
        return [tokenizer.decode(row[kept == 1], skip_special_tokens=True) for row, kept in zip(ids, mask, strict=True)]

    (workplace / "p.txt").write_text("one\n\n two \n")
    (workplace / "p.json").write_text(json.dumps(["one", {"prompt": "two"}, {"instruction": "three", "input": "four"}]))
    (workplace / "p.jsonl").write_text('"one"\n{"instruction": "two"}\n')
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (workplace / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat[:1]}))
    assert texts("one", "two") == ["one", "two"]
    assert texts("--file", "p.txt") == ["one", "two"]
    assert texts("--file", "p.json") == ["one", "two", "three\nfour"]
    assert texts("--file", "p.jsonl") == ["one", "two"]
    assert texts("--file", "chat.jsonl", template="chat") == ["<user>one<assistant>"] * 2
    assert texts("--file", "chat.jsonl", template="short") == ["<user>one<assistant>"] * 2, "messages are always chats"
    assert texts("--file", "p.json", template="chat") == [
        "<user>one<assistant>",
        "two",
        "<user>three\n\nfour<assistant>",
    ]
    record = Record(instruction="three", input="four", output="")
    assert texts("--file", "p.json", template="short")[1:] == ["two", record.prompt]
    assert texts("three", template="alpaca")[0].startswith("Below is an instruction that describes a task. Write")
    (workplace / "own.json").write_text(
        '{"prompt_input": "{instruction}+{input}=", "prompt_no_input": "{instruction}="}'
    )
    assert texts("--file", "p.json", template="own.json") == ["one=", "two", "three+four="]
    assert texts("<s>one") == texts("one"), "one BOS"
    assert int(calls.made[0][2].sum()) == len(tokenizer("one")["input_ids"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert texts() == ["one", "two"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\x0cand\u2028two\n"))
    assert len(texts()) == 1, "a line ends at a line feed alone"
    shutil.copy(workplace / "p.jsonl", workplace / "P.JSONL")
    assert texts("--file", "P.JSONL") == ["one", "two"]
    assert texts("--", "--dry_run a_b") == ["--dry_run a_b"], "what follows -- is no flag"


def test_fields_of_prompts_mean_what_they_do_in_training(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of(workplace / "model")
    alpaca = {"instruction": "three", "input": None, "output": "x", "system": "be", "history": [["one", "two"]]}
    chats = [
        {"messages": [{"role": "user", "content": "one"}], "system": "be"},
        {"messages": [{"from": "human", "value": "one"}]},
        {"messages": [{"role": "user", "content": "one"}], "tools": "[]"},
    ]
    (workplace / "p.json").write_text(json.dumps([alpaca, *chats]))
    prompts = read_prompts([], workplace / "p.json", sys.stdin)
    record = Record(instruction="three", input="", output="", system="be", history=(("one", "two"),))
    assert render(prompts[0], "short", tokenizer) == (record.prompt, False)
    assert [render(prompt, "short", tokenizer)[0] for prompt in prompts[1:]] == [
        "<system>be<user>one<assistant>",
        "<user>one<assistant>",
        "<user>one<assistant>",
    ]
    (workplace / "p.json").write_text(json.dumps({"instruction": "a", "images": ["b"]}))
    assert main(["generate", "--model", "model", "--file", "p.json"]) == 2
    assert "prompt 1 of p.json has a field images, which" in capsys.readouterr().err


def test_prompts_after_virtual_tokens_are_not_padded(workplace: Path, calls: Calls) -> None:
    config = pj.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model: Any = pj.get_peft_model(pj.AutoModelForCausalLM.from_pretrained("model"), config)
    trained, frozen = pj.partition(model)
    model = pj.combine(jax.tree.map(lambda array: 30 * array, trained), frozen)
    model.save_pretrained("prompted")
    tokenizer = tokenizer_of(workplace / "model")
    encoded = [encode(text, "raw", tokenizer) for text in ("ab", "abcd", "ba")]
    alone, padded = (model(*pad(encoded[:1], 1, length)).logits[0, -1] for length in (len(encoded[0]), 32))
    assert np.abs(alone - padded).max() > 1e-3, "padding changes no number"
    for prompts, rows in ((["ab"], [[0]]), (["ab", "abcd", "ba"], [[0, 2], [1, 1]])):
        calls.made.clear()
        words = ["--adapter", "prompted", "--prompt-template", "raw", "--batch-size", "2", *prompts]
        assert main(["generate", "--model", "model", *words]) == 0
        assert [made[1].tolist() for made in calls.made] == [[encoded[place] for place in batch] for batch in rows]
        assert all(made[2].all() for made in calls.made)


def test_a_table_of_positions_has_room_for_what_is_not_padding(run: Callable[..., str], workplace: Path) -> None:
    tokenizer = tokenizer_of(workplace / "model")
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    base: Any = pj.AutoModelForCausalLM.from_config(
        {"model_type": "gpt2", "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **sizes}
    )
    base.save_pretrained("gpt2")
    for file in (workplace / "model").glob("tokenizer*"):
        shutil.copy(file, workplace / "gpt2")
    prompt = "ab " * 20
    length = len(encode(prompt, "raw", tokenizer))
    assert 32 < length < 64
    words = ["generate", "--model", "gpt2", "--prompt-template", "raw", "--json", "--ignore-generation-config"]
    assert json.loads(run(*words, prompt))["tokens"] == 64 - length
    config = pj.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    pj.get_peft_model(base, config).save_pretrained("prompted")  # type: ignore[attr-defined]
    assert json.loads(run(*words, "--adapter", "prompted", prompt))["tokens"] == 60 - length


def test_prompts_have_the_tokens_of_training(workplace: Path) -> None:
    tokenizer = tokenizer_of(workplace / "model")
    record = Record(instruction="three", input="four", output="")
    ids, mask = tokenize_prompts([record], tokenizer)
    assert encode({"instruction": "three", "input": "four"}, "short", tokenizer) == ids[mask == 1].tolist()


def test_the_adapters_own_tokenizer_goes_first(workplace: Path, calls: Calls) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workplace / "model" / file, workplace / "adapter" / file)
    (workplace / "adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    asked(calls, "--prompt-template", "chat", prompts=("abc",))
    _, ids, mask, _ = calls.made[0]
    assert tokenizer_of(workplace / "model").decode(ids[mask == 1]) == "abc!"


def test_a_printer_never_prints_half_a_character(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of(workplace / "model")
    text = " 日本語 é 🎉🎉\n\nok  'x' \ufffd ß"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text), "every character is one token"
    printer, pieces = Printer(tokenizer), []
    printer.put(np.array([ids]))
    for token in ids:
        printer.put(np.array([token]))
        pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == text and sum(map(bool, pieces)) >= len(text) - 4
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd"), "a character was printed before it was whole"
    printer.end()
    assert capsys.readouterr().out == "\n"
    cut = Printer(tokenizer)
    for token in tokenizer("é", add_special_tokens=False)["input_ids"][:1]:
        cut.put(np.array([token]))
    assert capsys.readouterr().out == ""
    cut.end()
    assert capsys.readouterr().out == "\ufffd\n"


# ---------------------------------------------------------------- eval


def torch_loss(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> tuple[float, int]:
    """Mean loss over the answers and their end, and how many tokens these are, one record at a time."""
    import torch

    total, count = 0.0, 0
    for record in records:
        prompt = Record(**record).prompt
        start = len(tokenizer(prompt)["input_ids"])
        ids = [*tokenizer(prompt + record["output"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        total, count = total + float(loss) * (len(ids) - start), count + len(ids) - start
    return total / count, count


def test_eval_is_the_loss_of_pytorch(run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path) -> None:
    tokenizer, losses = tokenizer_of(workplace / "model"), []
    completions = [{"prompt": Record(**record).prompt, "completion": record["output"]} for record in RECORDS]
    (workplace / "same.jsonl").write_text("\n".join(map(json.dumps, completions)))
    for adapter, words in ((True, ["--adapter", "adapter"]), (False, ["--model", "model"])):
        want, count = torch_loss(torch_model(adapter), tokenizer, RECORDS)
        short = ["--prompt-template", "short"]
        said = run("eval", *words, "--data", "data.json", "--json", "--batch-size", "3", *short)
        found = json.loads(said)
        assert found["loss"] == pytest.approx(want, rel=0, abs=1e-5)
        assert found["perplexity"] == pytest.approx(np.exp(want), rel=1e-4)
        assert (found["target_tokens"], found["examples"], found["too_long"]) == (count, len(RECORDS), 0)
        losses.append(want)
        again = json.loads(run("eval", *words, "--data", "same.jsonl", "--json", "--batch-size", "3"))
        assert again == found, "the same texts as prompt and completion"
        other = json.loads(run("eval", *words, "--data", "data.json", "--json", "--prompt-template", "alpaca"))
        assert abs(other["loss"] - want) > 1e-4, "the template is dead"
    assert abs(losses[0] - losses[1]) > 1e-2, "the adapter is dead"


def test_eval_in_words(run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path) -> None:
    tokenizer = tokenizer_of(workplace / "model")
    lengths = [len(tokenizer(Record(**r).prompt + r["output"])["input_ids"]) + 1 for r in RECORDS]
    cutoff = sorted(lengths)[4]
    kept = [record for record, length in zip(RECORDS, lengths, strict=True) if length <= cutoff]
    want, count = torch_loss(torch_model(True), tokenizer, kept)
    words = ["--data", "data.json", "--cutoff-len", str(cutoff), "--long", "drop", "--prompt-template", "short"]
    said = run("eval", "--adapter", "adapter", *words)
    left_out = f", {len(RECORDS) - len(kept)} longer than {cutoff} left out"
    assert said.splitlines() == [
        f"Data        {len(kept)} examples, {count} tokens of answers{left_out}",
        f"Loss        {want:.4f} nats a token",
        f"Perplexity  {np.exp(want):.4g}",
    ]


def test_eval_heeds_element_type_and_int8(run: Callable[..., str]) -> None:
    def loss(*words: str) -> float:
        return float(json.loads(run("eval", "--model", "model", "--data", "data.json", "--json", *words))["loss"])

    plain = loss()
    for words in (["--dtype", "bfloat16"], ["--load-in-8bit"], ["--load-in-4bit"]):
        assert 1e-6 < abs(loss(*words) - plain) < 0.05


def test_eval_batches(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def watch(step: Any, model: Any, batches: Any) -> float:
        shapes.extend(batch["input_ids"].shape[0] for batch in batches)
        return 1.0

    monkeypatch.setattr("peft_jax.cli.shared.task.evaluate", watch)
    run("eval", "--model", "model", "--data", "data.json", "--batch-size", "3")
    run("eval", "--model", "model", "--data", "data.json")
    assert shapes == [3, 3, 3, 8]  # the texts are of about one length, so that a batch goes through the model whole


def test_eval_computes_adapters_in_the_type_that_is_asked_for(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def watch(step: Any, model: Any, batches: Any) -> float:
        found.append({leaf.compute_dtype for _, leaf in adapted_leaves(model)})
        return 1.0

    monkeypatch.setattr("peft_jax.cli.shared.task.evaluate", watch)
    for words in ([], ["--compute-dtype", "bfloat16"]):
        run("eval", "--adapter", "adapter", "--data", "data.json", *words)
    assert found == [{None}, {jnp.dtype("bfloat16")}]


# ---------------------------------------------------------------- merge

IDS = np.random.default_rng(0).integers(2, 280, (2, 9))


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.float().numpy()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_merge_writes_what_pytorch_loads(
    run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (workplace / "model" / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.5}')
    said = run("merge", "--adapter", "adapter", "--output", "deep/merged")
    out = workplace / "deep" / "merged"
    got = torch_logits(AutoModelForCausalLM.from_pretrained(out))
    np.testing.assert_allclose(got, torch_logits(torch_model(True)), rtol=0, atol=1e-5)
    assert np.abs(got - torch_logits(torch_model(False))).max() > 1e-2, "the adapter is dead"
    files, source = tree(out), tree(workplace / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert files[name] == source[name]
    assert json.loads(files["generation_config.json"]) == {"do_sample": True, "top_p": 0.5}
    assert files.keys() == source.keys() and "Wrote deep/merged" in said and max(map(len, said.splitlines())) <= 80
    assert [file.name for file in out.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("asked", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_merge_rounds_once(
    run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path, stored: str, asked: str
) -> None:
    """Every weight is the float32 sum, rounded to the asked type."""
    base = pj.AutoModelForCausalLM.from_pretrained("model", dtype=stored)
    base.save_pretrained("stored")
    run("merge", "--adapter", "adapter", "--output", "out", "--model", "stored", "--dtype", asked)
    full = pj.AutoModelForCausalLM.from_pretrained("stored", dtype="float32")
    pj.PeftModel.from_pretrained(full, "adapter").merge_and_unload().save_pretrained("sum")
    sums, got = load_file("sum/model.safetensors"), load_file("out/model.safetensors")
    for key, tensor in sums.items():
        np.testing.assert_array_equal(got[key], tensor.astype(jnp.dtype(asked)))
    assert json.loads((workplace / "out" / "config.json").read_text())["dtype"] == asked
    if asked == stored:
        run("merge", "--adapter", "adapter", "--output", "plain", "--model", "stored")
        assert tree(workplace / "plain")["model.safetensors"] == tree(workplace / "out")["model.safetensors"]


@pytest.mark.parametrize("load", ["load_in_8bit", "load_in_4bit"])
def test_an_adapter_trained_on_a_quantized_base_is_merged_into_the_float_weights(
    run: Callable[..., str], torch_model: Callable[..., Any], workplace: Path, load: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = pj.AutoModelForCausalLM.from_pretrained("model", **{load: True})
    model = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    trainable, frozen = pj.partition(model)
    model = pj.combine(jax.tree.map(lambda leaf: leaf + 0.1, trainable), frozen)
    model.save_pretrained("trained")
    run("merge", "--adapter", "trained", "--output", "out")
    want = PeftModel.from_pretrained(torch_model(False), "trained").eval()
    got = AutoModelForCausalLM.from_pretrained(workplace / "out")
    np.testing.assert_allclose(torch_logits(got), torch_logits(want), rtol=0, atol=1e-5)


def test_a_merge_that_fails_leaves_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)  # the tokenizer is copied last
    before = tree(workplace)
    assert main(["merge", "--adapter", "adapter", "--output", "deep/out"]) == 2
    assert tree(workplace) == before and not (workplace / "deep").exists()


def test_a_merge_that_finds_no_room_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("peft_jax.interop.files.save_file", full)
    assert main(["merge", "--adapter", "adapter", "--output", "out"]) == 2
    said = (
        "peft-jax: error: model.safetensors cannot be written: No space left on device. "
        "Free space on that disk, or name a folder on another one with --output."
    )
    assert capfd.readouterr().err.strip() == said and not Path("out").exists()


def test_merge_without_tokenizer_files_says_so(run: Callable[..., str], workplace: Path) -> None:
    for file in workplace.glob("model/*token*"):
        file.unlink()
    (workplace / "model" / "chat_template.jinja").unlink()
    said = run("merge", "--adapter", "adapter", "--output", "out")
    assert "no tokenizer files" in said and not list(workplace.glob("out/token*"))


# ---------------------------------------------------------------- wrong inputs


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def _nothing(folder: Path) -> None:
    """Leaves the folder as it is."""


def _other_model(folder: Path) -> None:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    text = json.dumps(config | {"base_model_name_or_path": "gone/away/model"})
    (folder / "adapter" / "adapter_config.json").write_text(text)


def _nameless(folder: Path) -> None:
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))


def _no_chat(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").unlink()
    (folder / "chat.json").write_text('[{"messages": [{"role": "user", "content": "a"}]}]')


GENERATE, EVAL = ["generate", "--adapter", "adapter"], ["eval", "--adapter", "adapter", "--data", "data.json"]
MERGE = ["merge", "--adapter", "adapter", "--output", "out"]
WRONG: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "neither model nor adapter": (_nothing, ["generate", "a"], "Name one with --model"),
    "no such model": (_nothing, ["generate", "--model", "./modle", "a"], "No folder './modle'. Name"),
    "no such adapter": (_nothing, ["generate", "--adapter", "adaptor", "a"], "No folder 'adaptor'. Give"),
    "a model for an adapter": (_nothing, ["generate", "--adapter", "model", "a"], "holds a whole model"),
    "a base that is gone": (_other_model, [*GENERATE, "a"], "Or give it with --model"),
    "a base that is not named": (_nameless, [*GENERATE, "a"], "Give it with --model"),
    "no prompt": (_nothing, GENERATE, "no prompt is given. Give it as a word"),
    "words and a file": (_nothing, [*GENERATE, "--file", "data.json", "a"], "Give one of them"),
    "no such file": (_nothing, [*GENERATE, "--file", "none.txt"], "no file of prompts at none.txt. Give"),
    "a file of nothing": (_write("p.txt", "\n"), [*GENERATE, "--file", "p.txt"], "p.txt holds no prompts. Give"),
    "a file that is not JSON": (_write("p.json", "{"), [*GENERATE, "--file", "p.json"], "p.json is not JSON"),
    "a prompt of another kind": (_write("p.json", "[1]"), [*GENERATE, "--file", "p.json"], "Each prompt is a text, or"),
    "messages that are text": (
        _write("p.json", '{"messages": "x", "instruction": "a"}'),
        [*GENERATE, "--file", "p.json"],
        "prompt 1 of p.json is",
    ),
    "a prompt without text": (_write("p.json", '[{"prompt": 1}]'), [*GENERATE, "--file", "p.json"], "Each prompt is"),
    "messages without a chat template": (
        _no_chat,
        [*GENERATE, "--file", "chat.json"],
        "has no chat template. Give --prompt-template short or raw, and no messages",
    ),
    "messages that the template refuses": (
        _write("model/chat_template.jinja", "{{ raise_exception('no system') }}"),
        [*GENERATE, "--prompt-template", "chat", "a"],
        "refuses the messages (no system). Give",
    ),
    "no chat template": (
        _no_chat,
        [*GENERATE, "--prompt-template", "chat", "a"],
        "Give --prompt-template short",
    ),
    "another template": (
        _nothing,
        [*GENERATE, "--prompt-template", "vicuna", "a"],
        "no prompt template 'vicuna'. Give",
    ),
    "another template of data": (_nothing, [*EVAL, "--prompt-template", "vicuna"], "no prompt template 'vicuna'. Give"),
    "a template of data with its own": (
        _write("data.json", '[{"prompt": "a", "completion": "b"}]'),
        [*EVAL, "--prompt-template", "alpaca"],
        "Leave it out",
    ),
    "mixed data": (
        _write("data.json", '[{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]'),
        EVAL,
        "Give one format a file",
    ),
    "drawing without do_sample": (_nothing, [*GENERATE, "--top-p", "0.5", "a"], "Add --do-sample"),
    "greedy drawing": (_nothing, [*GENERATE, "--greedy", "--top-k", "5", "a"], "--greedy and --top-k contradict"),
    "no temperature": (_nothing, [*GENERATE, "--do-sample", "--temperature", "0", "a"], "temperature is above 0"),
    "a top_p above 1": (_nothing, [*GENERATE, "--do-sample", "--top-p", "2", "a"], "--top-p is in (0, 1]"),
    "no tokens": (_nothing, [*GENERATE, "--max-new-tokens", "0", "a"], "--max-new-tokens is at least 1"),
    "too many tokens": (_nothing, [*GENERATE, "--max-new-tokens", "300", "a"], "or less"),
    "too long a prompt": (_nothing, [*GENERATE, "ab " * 300], "Shorten it"),
    "a stop of several tokens": (_nothing, [*GENERATE, "--stop-token", "qzx", "a"], "Give single tokens"),
    "no batch": (_nothing, [*GENERATE, "--batch-size", "0", "a"], "--batch-size is 0. Give"),
    "a negative seed": (_nothing, [*GENERATE, "--seed", "-1", "a"], "--seed is -1. Give"),
    "a large seed": (_nothing, [*GENERATE, "--seed", str(2**63), "a"], f"--seed is {2**63}. Give"),
    "beams": (
        _write("model/generation_config.json", '{"num_beams": 4}'),
        [*GENERATE, "a"],
        "on the command line --ignore-generation-config",
    ),
    "a damaged generation config": (_write("model/generation_config.json", "{"), [*GENERATE, "a"], "is not JSON"),
    "eval without data": (_nothing, ["eval", "--model", "model"], "--data"),
    "eval on no such data": (_nothing, ["eval", "--model", "model", "--data", "x.json"], "no data file at x.json"),
    "eval in no batches": (_nothing, [*EVAL, "--batch-size", "0"], "--batch-size is 0. Give"),
    "eval of nothing": (_nothing, [*EVAL, "--cutoff-len", "4"], "Raise --cutoff-len to"),
    "a cutoff of nothing": (_nothing, [*EVAL, "--cutoff-len", "0"], "--cutoff-len is 0. Give"),
    "an output in use": (_write("out/file", "mine"), MERGE, "Name another one with --output"),
    "a merge of a damaged adapter": (_write("adapter/adapter_model.safetensors", "x"), MERGE, "is damaged or cut off"),
    "a merge without adapter": (_nothing, ["merge", "--output", "out"], "--adapter"),
    "another element type": (_nothing, [*MERGE, "--dtype", "int8"], "--dtype"),
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
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("peft-jax: error: ") and said in errors[0], errors
    assert not out and (tree(workplace), sorted(workplace.rglob("*"))) == before


def test_output_that_nobody_reads_on_is_no_error(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main(["inspect", "adapter"]) == 141
    assert capfd.readouterr().err == ""
