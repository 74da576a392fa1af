"""What is trained on: formats, templates, chats, packing, and the same losses as in PyTorch."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import AutoTokenizer

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply
from peft_jax.train import (
    Chat,
    Completion,
    Packed,
    Padded,
    Record,
    evaluate,
    evaluation_batches,
    load_template,
    make_evaluation_step,
    make_training_step,
    read_data,
    steps_per_epoch,
    training_batches,
)
from peft_jax.train.batch_loss import logits_of
from peft_jax.train.data.batches import collate, fixed_lengths
from peft_jax.train.data.encode import IGNORE, Example, encode

RECORDS = [Record("Say the number.", str(n), f"number {n}" * (1 + n % 3)) for n in range(9)]
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye now"},
    {"role": "assistant", "content": "See you"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' A: ' + m['content'] + eos_token }}"
    "{% else %}{{ ' Q: ' + m['content'] }}{% endif %}{% endfor %}"
)
MARKED = PLAIN.replace("{{ ' A: ' + m", "{{ ' A: ' }}{% generation %}{{ m").replace(
    "eos_token }}{% else", "eos_token }}{% endgeneration %}{% else"
)
UNENDED = MARKED.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}")
ENDLESS = PLAIN.replace(" + eos_token", "")


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    base = pj.AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = pj.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return pj.get_peft_model(base, config)


def trained(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE])


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_three_formats_are_read(tmp_path: Path, ending: str) -> None:
    objects: dict[str, list[Any]] = {
        "alpaca": [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}],
        "completion": [{"prompt": "a", "completion": "b"}],
        "chat": [{"messages": TURNS}],
    }
    found = []
    for name, values in objects.items():
        text = json.dumps(values) if ending == "json" else "\n".join(map(json.dumps, values))
        (tmp_path / name).write_text(text)
        found += read_data(tmp_path / name)
    assert found == [Record("a", "", "b"), Record("a", "", "b"), Completion("a", "b"), Chat(tuple(TURNS))]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]', "record 2 .* one format a file"),
        ('[{"prompt": "a"}]', "record 1 .* lacks completion; it has prompt"),
        ('[{"messages": []}]', "messages that are no list, or an empty one"),
        ('[{"messages": [{"role": "user"}]}]', "message 1 in record 1 .* lacks a role or a content"),
        ('[{"messages": [{"role": "user", "content": "a"}]}]', "no message of role assistant"),
        ('[{"body": "a"}]', "lacks instruction and output; it has body.*or messages, or text and label"),
        ('[{"sentence": "a", "label": 1}]', "lacks text; it has sentence, label"),
        ("nonsense", "is not JSON in line 1"),
    ],
)
def test_data_of_no_known_format_says_what_to_write(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_data(tmp_path / "data.json")


def test_templates_by_name_and_from_alpaca_loras_files(tmp_path: Path) -> None:
    assert load_template("short")(RECORDS[0]).prompt == RECORDS[0].prompt
    assert load_template("alpaca")(RECORDS[0]).prompt.startswith("Below is an instruction that describes a task, ")
    file = tmp_path / "mine.json"
    texts = {"prompt_input": "{instruction}|{input}|{{}}", "prompt_no_input": "{instruction}|", "description": "mine"}
    file.write_text(json.dumps(texts))
    assert load_template(file)(Record("a", "{b}", "c")) == Completion("a|{b}|{}", "c")
    assert load_template(file)(Record("a", "", "c")) == Completion("a|", "c")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no prompt template .* Give short, alpaca or a JSON file"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"prompt_input": "{instruction}"}', "lacks a text"),
        (
            '{"prompt_input": "{instruction}{question}", "prompt_no_input": "{instruction}"}',
            "names the fields .*question",
        ),
        ('{"prompt_input": "{instruction", "prompt_no_input": "{instruction}"}', "a brace too many or too few"),
    ],
)
def test_a_wrong_template_says_what_to_write(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=said):
        load_template(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, "Hi<|im_end|>\nSee you<|im_end|>\n</s>"),  # its marks are plain text to this tokenizer
        (PLAIN, " A: Hi</s> A: See you</s>"),
        (MARKED, "Hi</s>See you</s>"),
        (
            MARKED.replace(" + eos_token }}{% endgeneration %}", " }}{% endgeneration %}{{ eos_token }}"),
            "Hi</s>See you</s>",
        ),
        (ENDLESS, " A: Hi A: See you</s>"),
    ],
    ids=["chatml", "plain", "marked", "marks without EOS", "no end marks"],
)
def test_of_a_chat_the_assistants_turns_are_trained(tokenizer: Any, template: str, wanted: str) -> None:
    tokenizer.chat_template = template
    [example], _ = encode([Chat(tuple(TURNS))], tokenizer, cutoff_len=256)
    assert trained(example, tokenizer) == wanted
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template's BOS alone
    assert example.input_ids[: len(ids)].tolist() == ids and len(example.input_ids) <= len(ids) + 1
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == (template is not CHATML)


def test_the_marks_of_transformers_and_ours_agree(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    found = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    [example], _ = encode([Chat(tuple(TURNS))], tokenizer, cutoff_len=256)
    assert np.array_equal(example.labels != IGNORE, np.array(found["assistant_masks"]) == 1)


def test_chats_that_cannot_be_laid_out(tokenizer: Any) -> None:
    chat = [Chat(tuple(TURNS))]
    with pytest.raises(ValueError, match="no chat template, which messages need"):
        encode(chat, tokenizer, cutoff_len=256)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(ValueError, match="refuses chat 1: no system turns"):
        encode(chat, tokenizer, cutoff_len=256)
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match="lays out message 3 of chat 1 differently"):
        encode(chat, tokenizer, cutoff_len=256)


def test_bos_is_not_doubled_and_inputs_are_trained_on_request(tokenizer: Any) -> None:
    [example], _ = encode([Completion("<s>ab", "c")], tokenizer, cutoff_len=32)
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert trained(example, tokenizer) == "c</s>"
    [whole], _ = encode([Completion("<s>ab", "c")], tokenizer, cutoff_len=32, train_on_inputs=True)
    assert trained(whole, tokenizer) == "abc</s>"


def test_batches_have_few_lengths_and_every_epoch_holds_each_row_once(tokenizer: Any) -> None:
    assert [fixed_lengths(n) for n in (20, 32, 64, 100, 256)] == [
        (20,),
        (32,),
        (32, 64),
        (32, 64, 100),
        (32, 64, 128, 256),
    ]
    examples = [Example(np.full(n, n, np.int32), np.full(n, n, np.int32)) for n in (3, 31, 32, 33, 64, 65, 90)]
    data = Padded(examples, 90)
    assert data.lengths == (32, 64, 90)
    batches = training_batches(data, 2, seed=3)
    assert steps_per_epoch(data, 2) == 4
    for epoch in (0, 1):
        found = [batches[4 * epoch + n] for n in range(4)]
        assert sorted(int(row.max()) for batch in found for row in batch["labels"] if row.max() > 0) == [
            *(3, 31, 32, 33, 64, 65, 90),
        ]
        for batch in found:
            longest = int(batch["attention_mask"].sum(1).max())
            assert batch["input_ids"].shape == (2, next(n for n in (32, 64, 90) if n >= longest))


def per_token_losses(model: Any, data: Any, size: int) -> dict[tuple[int, ...], np.ndarray]:
    """The losses of each text, by its ids."""
    found = {}
    for start in range(0, len(data), size):
        batch = collate([data[n] for n in range(start, min(start + size, len(data)))], size, data.lengths)
        log_p = jax.nn.log_softmax(logits_of(apply, model, batch))
        for row in range(size):
            segments = batch.get("segment_ids", batch["attention_mask"])[row]
            for number in range(1, segments.max() + 1):
                where = np.flatnonzero(segments == number)
                ids = batch["input_ids"][row, where]
                found[tuple(ids.tolist())] = -np.asarray(log_p[row, where[:-1], ids[1:]])
    return found


def test_packing_and_padding_give_the_same_losses(model: Any, tokenizer: Any) -> None:
    examples, _ = encode(RECORDS, tokenizer, cutoff_len=256)
    packed, padded = Packed(examples, 150), Padded(examples)
    assert len(packed) < len(padded) == len(RECORDS)
    one, other = per_token_losses(model, packed, 2), per_token_losses(model, padded, 3)
    assert one.keys() == other.keys() and len(one) == len(RECORDS)
    for ids in one:
        np.testing.assert_allclose(one[ids], other[ids], rtol=1e-5, atol=1e-5)
    step = make_evaluation_step(apply)
    losses = [evaluate(step, model, evaluation_batches(data, 2)) for data in (packed, padded)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    for data in (packed, padded):  # EOS is trained and the first token of a text is not, wherever it lies
        for number in range(len(data)):
            row = data[number]
            assert np.all(row["labels"][row["input_ids"] == tokenizer.bos_token_id] == IGNORE)
            assert np.all(row["labels"][row["input_ids"] == tokenizer.eos_token_id] != IGNORE)


def test_packing_fills_rows_and_cuts_nothing() -> None:
    lengths = [5, 9, 3, 7, 2, 8, 1]
    examples = [Example(np.full(n, n, np.int32), np.full(n, n, np.int32)) for n in lengths]
    rows = [Packed(examples, 10)[n] for n in range(len(Packed(examples, 10)))]
    assert [len(row["input_ids"]) for row in rows] == [10, 10, 7, 8]
    assert sorted(np.concatenate([row["input_ids"] for row in rows])) == sorted(np.repeat(lengths, lengths))


def test_accumulation_gives_the_update_of_the_whole_batch(model: Any, tokenizer: Any) -> None:
    records = [Record("Say it.", str(n), "x" * (n % 17)) for n in range(126)]  # two rows stay empty
    data = Padded(encode(records, tokenizer, cutoff_len=64).examples)
    batch = training_batches(data, 128, seed=0)[0]
    assert np.sum(np.all(batch["labels"] == IGNORE, axis=1)) == 2
    optimizer, found = optax.sgd(1.0), []
    for size in (4, 128):
        trainable, frozen = pj.partition(jax.tree.map(jnp.copy, model))
        before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(trainable)]
        step = make_training_step(apply, optimizer, micro_batch_size=size)
        trainable, _, metrics = step(trainable, optimizer.init(trainable), frozen, batch, jax.random.key(0))
        updates = [np.asarray(new) - old for new, old in zip(jax.tree.leaves(trainable), before, strict=True)]
        found.append((updates, [float(value) for value in metrics]))
    assert max(np.abs(update).max() for update in found[0][0]) > 1e-3
    for one, other in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["alpaca", "completion", "chat", "everything"])
def test_the_loss_of_a_batch_is_pytorchs(
    tiny_llama: Path, tmp_path: Path, tokenizer: Any, model: Any, kind: str
) -> None:
    """The oracle makes its own tokens and labels, by what transformers and PEFT users write by hand."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer.chat_template = MARKED
    records: list[Any] = {
        "alpaca": RECORDS[:3],
        "completion": [Completion("a b c", " d"), Completion("x", " y z")],
        "chat": [Chat(tuple(TURNS)), Chat(tuple(TURNS[:3]))],
        "everything": RECORDS[:3],
    }[kind]
    rows = []
    for record in records:
        if isinstance(record, Chat):
            chat = list(record.messages)
            found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
            rows.append((found["input_ids"], [m == 1 for m in found["assistant_masks"]]))
            continue
        if isinstance(record, Record):
            prompt = f"### Instruction:\n{record.instruction}\n\n### Input:\n{record.input}\n\n### Response:\n"
            answer = record.output
        else:
            prompt, answer = record.prompt, record.completion
        given = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[: len(given)] == given and ids[0] == tokenizer.bos_token_id
        rows.append((ids, [kind == "everything" or n >= len(given) for n in range(len(ids))]))
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    chosen = torch.tensor([keep + [False] * (width - len(keep)) for _, keep in rows])
    model.save_pretrained(tmp_path)
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    with torch.no_grad():
        want = oracle(input_ids, attention_mask=mask, labels=torch.where(chosen, input_ids, -100)).loss

    data = Padded(encode(records, tokenizer, cutoff_len=256, train_on_inputs=kind == "everything").examples)
    trainable, frozen = pj.partition(jax.tree.map(jnp.copy, model))
    optimizer = optax.sgd(0.0)
    batch = collate([data[n] for n in range(len(data))], 4, data.lengths)
    step = make_training_step(apply, optimizer, micro_batch_size=2)
    *_, metrics = step(trainable, optimizer.init(trainable), frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(float(metrics.loss), float(want), rtol=1e-5)
    assert int(metrics.tokens) == sum(len(ids) for ids, _ in rows)
