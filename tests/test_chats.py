"""Chats: which tokens are learned, by templates with the features of Qwen's, Llama's, Gemma's and Mistral's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

from peft_jax.cli.main import main
from peft_jax.cli.shared.training_layout import (
    CHATS,
    EVERYTHING,
    TEXTS,
    NamedLayout,
    TrainingLayout,
    choose_layout,
    clash,
    layout_text,
    read_layout,
    template_digest,
)
from peft_jax.models.resize import LAYOUT_FILE
from peft_jax.prompts.chat_template import end_of_turn
from peft_jax.train import Chat, load_template
from peft_jax.train.data.chats import LAST, MARKS, TURNS, ChatMasks
from peft_jax.train.data.encode import IGNORE, encode

# Earlier thoughts are dropped, and the last answer always has one.
QWEN = """{%- set state = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set state.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- if messages[0].role == 'system' or tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
    {%- if tools %}{{- '\\nTools:' }}{%- for t in tools %}{{- ' ' + t.function.name }}{%- endfor %}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > state.asked and (loop.last or m.reasoning_content) %}
            {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n' }}
        {%- endif %}
        {{- m.content }}
        {%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name + '</call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<result>' + m.content + '</result><|im_end|>\\n' }}
    {%- elif m.role == 'user' %}{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# BOS, headers, and another mark behind a call of a tool than behind an answer.
LLAMA = """{{- bos_token }}
{%- macro head(role) %}{{- '<|head|>' + role + '<|/head|>\\n\\n' }}{%- endmacro %}
{%- if messages[0].role == 'system' or tools %}
    {{- head('system') }}{%- if tools %}{{- 'Tools:' }}{%- for t in tools %}{{- ' ' + t.function.name }}{%- endfor %}
    {{- '\\n' }}{%- endif %}{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}
    {{- '<|eot|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.tool_calls %}{{- head('assistant') + m.tool_calls[0].function.name + '<|eom|>' }}
    {%- elif m.role == 'tool' %}{{- head('ipython') + m.content + '<|eot|>' }}
    {%- elif m.role != 'system' %}{{- head(m.role) + m.content | trim + '<|eot|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"""
# The system prompt stands in the first question, and the assistant has another name.
GEMMA = """{{- bos_token }}{%- set first = '' %}{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}{%- set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {%- if loop.first %}{{- first }}{%- endif %}{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}"""
# Tools and system prompt stand in the last question, the latter only where no answer follows.
MISTRAL = """{{- bos_token }}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == asked[-1] %}{{- '[TOOLS]' + tools[0].function.name + '[/TOOLS]' }}{%- endif %}
        {{- '[INST] ' }}{%- if loop.last and system %}{{- system + '\\n\\n' }}{%- endif %}{{- m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}{{- '[CALL]' + m.tool_calls[0].function.name + eos_token }}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content + '[/RESULT]' }}
    {%- endif %}
{%- endfor %}"""

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|eom|>", "<turn>", "<end_of_turn>")
TOOL = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
SYSTEM, ASK, MORE = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "user", "content": "And now?"},
)
HI = {"role": "assistant", "content": "Hi", "reasoning_content": "greet"}
BYE = {"role": "assistant", "content": "Bye", "reasoning_content": "leave"}
RESULT = {"role": "tool", "content": "noon"}
TALK = (SYSTEM, ASK, HI, MORE, BYE)
CALLS = (ASK, {**CALL, "reasoning_content": "look"}, RESULT, HI)


def tokenizer_with(folder: Path, template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = template
    return tokenizer


# By hand: the whole text, with what is learned in braces.
ROWS: dict[str, tuple[str, Chat, str, str]] = {
    "qwen, two answers": (
        QWEN,
        Chat(TALK),
        LAST,
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi"
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        "{<think>\nleave\n</think>\nBye<|im_end|>}\n",
    ),
    "qwen, a tool": (
        QWEN,
        Chat(CALLS, tools=(TOOL,)),
        TURNS,
        "<|im_start|>system\n\nTools: clock<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        "{<think>\nlook\n</think>\n<call>clock</call><|im_end|>}\n<|im_start|>user\n<result>noon</result><|im_end|>\n"
        "<|im_start|>assistant\n{<think>\ngreet\n</think>\nHi<|im_end|>}\n",
    ),
    "llama, two answers": (
        LLAMA,
        Chat(TALK),
        TURNS,
        "<s><|head|>system<|/head|>\n\nBe short.<|eot|><|head|>user<|/head|>\n\nHello<|eot|><|head|>assistant<|/head|>"
        "\n\n{Hi<|eot|>}<|head|>user<|/head|>\n\nAnd now?<|eot|><|head|>assistant<|/head|>\n\n{Bye<|eot|>}",
    ),
    "llama, a tool": (
        LLAMA,
        Chat(CALLS, tools=(TOOL,)),
        TURNS,
        "<s><|head|>system<|/head|>\n\nTools: clock\n<|eot|><|head|>user<|/head|>\n\nHello<|eot|>"
        "<|head|>assistant<|/head|>\n\n{clock<|eom|>}<|head|>ipython<|/head|>\n\nnoon<|eot|>"
        "<|head|>assistant<|/head|>\n\n{Hi<|eot|>}",
    ),
    "llama, an answer that is given": (
        LLAMA,
        Chat(TALK, given=(2,)),
        TURNS,
        "<s><|head|>system<|/head|>\n\nBe short.<|eot|><|head|>user<|/head|>\n\nHello<|eot|><|head|>assistant<|/head|>"
        "\n\nHi<|eot|><|head|>user<|/head|>\n\nAnd now?<|eot|><|head|>assistant<|/head|>\n\n{Bye<|eot|>}",
    ),
    "gemma, two answers": (
        GEMMA,
        Chat(TALK),
        TURNS,
        "<s><turn>user\nBe short.\n\nHello<end_of_turn>\n<turn>model\n{Hi<end_of_turn>}\n<turn>user\nAnd now?"
        "<end_of_turn>\n<turn>model\n{Bye<end_of_turn>}\n",
    ),
    "mistral, two answers": (
        MISTRAL,
        Chat(TALK[1:]),
        TURNS,
        "<s>[INST] Hello[/INST]{ Hi</s>}[INST] And now?[/INST]{ Bye</s>}",
    ),
    "mistral, a system prompt": (  # as it is generated from, and not as the whole chat is rendered
        MISTRAL,
        Chat(TALK),
        LAST,
        "<s>[INST] Hello[/INST] Hi</s>[INST] Be short.\n\nAnd now?[/INST]{ Bye</s>}",
    ),
    "mistral, a tool": (
        MISTRAL,
        Chat((ASK, HI, MORE, CALL, RESULT, BYE), tools=(TOOL,)),
        LAST,
        "<s>[INST] Hello[/INST] Hi</s>[TOOLS]clock[/TOOLS][INST] And now?[/INST]{[CALL]clock</s>}"
        "[RESULT]noon[/RESULT]{ Bye</s>}",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_exactly_these_tokens_are_learned(tiny_llama: Path, name: str) -> None:
    template, chat, rule, want = ROWS[name]
    tokenizer, masks = tokenizer_with(tiny_llama, template), ChatMasks()
    [example], _ = encode([chat], tokenizer, cutoff_len=1024, masks=masks)
    ids, trained = [], []
    for number, part in enumerate(want.replace("}", "{").split("{")):
        found = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += found
        trained += [number % 2 == 1] * len(found)
    assert tokenizer.decode(example.input_ids) == tokenizer.decode(ids)
    assert example.input_ids.tolist() == ids
    assert (example.labels != IGNORE).tolist() == trained
    assert masks.rules == {rule: 1} and (masks.left_out > 0) == (rule == LAST)
    assert masks.ends == {ids[n] for n in range(len(ids)) if trained[n] and not trained[n + 1 : n + 2] == [True]}


@pytest.mark.parametrize(
    ("template", "end"), [(QWEN, "<|im_end|>"), (LLAMA, "<|eot|>"), (GEMMA, "<end_of_turn>"), (MISTRAL, "</s>")]
)
def test_the_mark_that_ends_a_turn(tiny_llama: Path, template: str, end: str) -> None:
    tokenizer = tokenizer_with(tiny_llama, template)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


MARKED = {  # what the marks hold of a turn: its text and end, all of it with the newline
    "llama": LLAMA.replace(
        "{{- head(m.role) + m.content | trim + '<|eot|>' }}",
        "{{- head(m.role) }}{% if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|eot|>' }}"
        "{% endgeneration %}{% else %}{{- m.content | trim + '<|eot|>' }}{% endif %}",
    ),
    "gemma": GEMMA.replace(
        "{{- m.content | trim + '<end_of_turn>\\n' }}",
        "{% if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<end_of_turn>\\n' }}{% endgeneration %}"
        "{% else %}{{- m.content | trim + '<end_of_turn>\\n' }}{% endif %}",
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_generation_marks_say_what_transformers_reads_in_them(tiny_llama: Path, name: str) -> None:
    tokenizer, masks = tokenizer_with(tiny_llama, MARKED[name]), ChatMasks()
    found = tokenizer.apply_chat_template(list(TALK), return_dict=True, return_assistant_tokens_mask=True)
    [example], _ = encode([Chat(TALK)], tokenizer, cutoff_len=1024, masks=masks)
    assert example.input_ids.tolist() == found["input_ids"] and masks.rules == {MARKS: 1}
    assert np.array_equal(example.labels != IGNORE, np.array(found["assistant_masks"]) == 1)
    assert len(masks.ends) == 1 and 0 < sum(found["assistant_masks"]) < len(found["input_ids"])
    [one], _ = encode([Chat(TALK, given=(2,))], tokenizer, cutoff_len=1024)
    assert 0 < np.sum(one.labels != IGNORE) < sum(found["assistant_masks"])
    with pytest.raises(ValueError, match="nothing of chat 1 is learned"):
        encode([Chat(TALK, given=(2, 4))], tokenizer, cutoff_len=1024)


def test_a_layout_is_the_given_one_or_that_of_training_or_the_chat_templates(tiny_llama: Path, tmp_path: Path) -> None:
    plain, chats = AutoTokenizer.from_pretrained(tiny_llama), tokenizer_with(tiny_llama, LLAMA)
    alpaca = TrainingLayout(NamedLayout("alpaca", load_template("alpaca")), EVERYTHING)
    assert choose_layout(None, None, plain, chats=True).name == "short"
    assert choose_layout(None, None, chats, chats=True) == CHATS
    assert choose_layout(None, None, chats, chats=False).name == "short", "an encoder-decoder continues no chats"
    assert choose_layout(None, alpaca, chats, chats=True) == alpaca.used
    assert choose_layout("raw", alpaca, chats, chats=True) == TEXTS
    with pytest.raises(ValueError, match="chat is for CAUSAL_LM. Give short"):
        choose_layout("chat", None, chats, chats=False)
    of_chats = TrainingLayout(
        CHATS, template=template_digest(chats), chat_masks={LAST: 2}, answers_left_out=3, tokens=288
    )
    for layout in (alpaca, of_chats):
        (tmp_path / LAYOUT_FILE).write_text(layout_text(layout))
        assert read_layout(tmp_path) == layout
    assert clash(of_chats, [CHATS], chats) is None and clash(None, [TEXTS], chats) is None
    assert "trained with the layout alpaca, and the layout here is chat" in str(clash(alpaca, [CHATS], chats))
    chats.chat_template = GEMMA
    assert "trained with another chat template" in str(clash(of_chats, [CHATS], chats))
    (tmp_path / LAYOUT_FILE).write_text('{"prompt_template": "alpaca"}')
    with pytest.raises(ValueError, match="training_layout.json' is damaged"):
        read_layout(tmp_path)


# ---------------------------------------------------------------- the commands

SHORT = QWEN.replace("(loop.last or m.reasoning_content)", "m.reasoning_content")


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose turns do not end with its EOS, and a run on chats that it has learned by heart."""
    folder = tmp_path_factory.mktemp("chats")
    shutil.copytree(tiny_llama, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["vocab_size"] >= len(tokenizer)
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    (folder / "chats.json").write_text(json.dumps([chat] * 4))
    words = ["--model", str(folder / "model"), "--data", str(folder / "chats.json"), "--output", str(folder / "run")]
    size_of_run = ["--max-steps", "60", "--batch-size", "4", "--learning-rate", "2e-2", "--r", "16"]
    assert main(["finetune", *words, *size_of_run, "--target-modules", "all-linear"]) == 0
    return folder


def test_the_folder_alone_says_how_to_ask_and_where_to_stop(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    tokenizer = AutoTokenizer.from_pretrained(run)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.chat_template == SHORT
    assert GenerationConfig.from_pretrained(run).eos_token_id == [end, tokenizer.eos_token_id]
    layout = json.loads((run / "training_layout.json").read_text())
    assert layout["prompt_template"] == "chat" and layout["end_of_turn"] == ["<|im_end|>"]
    assert (layout["learned"], layout["chat_masks"]) == ("answers", {TURNS: 4})

    def ask(*words: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert main(["generate", "--adapter", str(run), "--max-new-tokens", "12", "--json", *words, "Hello"]) == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    found, note = ask()
    assert (found["text"], found["finish_reason"], found["tokens"], note) == ("Hi", "stop", 3, "")
    assert ask("--ignore-generation-config")[0] == found, "the layout's own end"
    other, note = ask("--prompt-template", "short")
    assert "was trained with the layout chat, and the layout here is short" in note and other["prompt"] == "Hello"
    (trained / "rows.json").write_text(json.dumps([{"instruction": "Hello", "output": "Hi"}]))
    losses = []
    for words in ([], ["--prompt-template", "short"]):
        capsys.readouterr()
        assert main(["eval", "--adapter", str(run), "--data", str(trained / "rows.json"), "--json", *words]) == 0
        said = capsys.readouterr()
        losses.append(json.loads(said.out))
        assert ("was trained with the layout chat" in said.err) == bool(words)
    assert losses[0]["loss"] < losses[1]["loss"] - 1e-3 and losses[0]["target_tokens"] == 3
    merged = trained / "merged"
    assert main(["merge", "--adapter", str(run), "--output", str(merged)]) == 0
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [end, tokenizer.eos_token_id]


def test_the_cards_program_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    card = (trained / "run" / "README.md").read_text()
    assert "Prompts are laid out with the tokenizer's chat template. The answers were learned." in card
    program = card.split("```python\n")[1].split("```")[0].replace("Name three colours.", "Hello")
    monkeypatch.chdir(trained / "run")
    capsys.readouterr()
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "Hi"
