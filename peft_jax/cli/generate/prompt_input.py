"""Prompts of the generate command: from words, a file or standard input to token ids."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from peft_jax.cli.shared.training_layout import CHATS, TEXTS, NamedLayout
from peft_jax.core.selecting import not_none
from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.core.text_files import read_text
from peft_jax.prompts import chat_template
from peft_jax.prompts.chat_template import Message, Tools, has_chat_template
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train import Chat, Record
from peft_jax.train.data.record_forms import form_of, to_record
from peft_jax.train.data.records import Completion
from peft_jax.train.data.template import Layout, load_layout

Prompt = str | dict[str, Any]
KINDS = "a text, or an object with instruction (and input), prompt, or messages"
ANSWER = "?"  # stands for the answer that is to come, as a record of training data has one


def read_prompts(words: Sequence[str], file: Path | None, stdin: TextIO) -> list[Prompt]:
    """The prompts: the words of the command line, or those in a file, or the lines of standard input.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are none, both words and a file, or the file is not of the format that its name says.
    """
    if words and file is not None:
        raise ValueError("prompts are given as words and with --file. Give one of them.")
    if words:
        return list(words)
    if file is None:
        if stdin.isatty():
            raise ValueError("no prompt is given. Give it as a word, with --file, or on standard input.")
        return _not_empty(_lines(stdin.read()), "standard input")
    text = read_text(file, "file of prompts", "Give JSON, JSONL, or a text file of one prompt a line.")
    if file.suffix.lower() not in (".json", ".jsonl"):
        return _not_empty(_lines(text), str(file))
    prompts = [_checked(value, number, file) for number, value in enumerate(_values(text, file), 1)]
    return _not_empty(prompts, str(file))


def _lines(text: str) -> list[Prompt]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _not_empty(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise ValueError(f"{where} holds no prompts. Give at least one.")
    return prompts


def _values(text: str, file: Path) -> list[Any]:
    try:
        if file.suffix.lower() == ".jsonl":
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        values = parse_json(text)
    except JSONError as error:
        raise ValueError(f"{file} is not {file.suffix[1:].upper()}: {error}. Each prompt is {KINDS}.") from error
    return values if isinstance(values, list) else [values]


def _checked(value: Any, number: int, file: Path) -> Prompt:
    """A prompt from a file, without fields that are null; ``number`` is its place there."""
    if isinstance(value, str):
        return value
    value = not_none(value) if isinstance(value, dict) else value
    if _is_conversation(value) or _is_instruction(value):
        _record(value, f"prompt {number} of {file}")
        return dict(value)
    raise ValueError(f"prompt {number} of {file} is {json.dumps(value)[:60]}. Each prompt is {KINDS}.")


def _is_instruction(value: Any) -> bool:
    """Whether a value is an object with texts instruction and perhaps input, or prompt, and without messages."""
    if not isinstance(value, dict) or "messages" in value:
        return False
    if "instruction" in value:
        return isinstance(value["instruction"], str) and isinstance(value.get("input", ""), str)
    return isinstance(value.get("prompt"), str)


def _is_conversation(value: Any) -> bool:
    """Whether a value is an object with messages, which go before its other fields."""
    if not isinstance(value, dict):
        return False
    messages = value.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(message, dict) for message in messages)


def _record(prompt: Prompt, where: str) -> Record | Completion | Chat:
    """A prompt as a record of training data, with an answer at the end.

    So every field of messages and of an instruction means what it does in training, or is refused.
    """
    if isinstance(prompt, str):
        return Record(prompt, "", ANSWER)
    if "messages" in prompt:
        messages = list(prompt["messages"])
        if messages[-1].get("role") == "assistant":  # the answer, in a file of training data
            messages = messages[:-1]
        value = {**prompt, "messages": [*messages, {"role": "assistant", "content": ANSWER}]}
    elif "instruction" in prompt:
        value = {name: field for name, field in prompt.items() if name != "prompt"} | {"output": ANSWER}
    else:
        return Completion(prompt["prompt"], ANSWER)
    record = to_record(value, form_of(value, where), where)
    assert isinstance(record, Record | Chat)  # of these fields
    return record


def layout_of(prompt: Prompt, chosen: NamedLayout) -> NamedLayout:
    """The layout of a prompt: messages and ``prompt`` have their own, and texts and instructions the chosen one."""
    if isinstance(prompt, dict) and "messages" in prompt:
        return CHATS
    if isinstance(prompt, dict) and "instruction" not in prompt:
        return TEXTS
    return chosen


def render(prompt: Prompt, layout: str | Layout, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The text of a prompt, and whether it is a chat template's, which writes special tokens itself.

    As in training, the layout is that of texts and instructions, ``prompt`` is used unchanged, and the tokenizer's chat
    template formats ``messages``.

    Raises:
        FileNotFoundError: If there is no such layout.
        ValueError: If it is damaged, the tokenizer has no chat template, or the chat template refuses the messages.
    """
    record = _record(prompt, "the prompt")
    if isinstance(record, Record):
        lay_out = load_layout(layout) if isinstance(layout, str) else layout
        record = lay_out(record)
    if isinstance(record, Chat):
        return _chat(record.messages[:-1], record.tools, tokenizer), True
    return record.prompt, False


def _chat(messages: Sequence[Message], tools: Tools, tokenizer: Tokenizer) -> str:
    if not has_chat_template(tokenizer):
        raise ValueError("the tokenizer has no chat template. Give --prompt-template short or raw, and no messages.")
    try:
        return chat_template.render(messages, tokenizer, tools=tools, prompt=True)
    except chat_template.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages ({error}). Give --prompt-template raw.") from error


def encode(prompt: Prompt, layout: str | Layout, tokenizer: Tokenizer, *, goes_on: bool = True) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts before a text.

    Those after a text are left out if the model is to continue the prompt. An encoder-decoder, for which ``goes_on`` is
    False, gets them.
    """
    text, is_chat = render(prompt, layout, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"])
    if ids[1:] and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text has one of its own
        ids = ids[1:]
    if not goes_on or is_chat or not ids:
        return ids
    if ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids


def pad(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (rows, length), padded on the left; rows beyond the prompts repeat the last one."""
    ids, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def standard_input() -> TextIO:
    """Standard input, as it is when the command runs."""
    return sys.stdin
