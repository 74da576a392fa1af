"""Prompts of the generate command: from words, a file or standard input to token ids."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from peft_jax.train import Record, load_template
from peft_jax.train.data.text_files import read_text

Prompt = str | dict[str, Any]
KINDS = "a text, or an object with instruction (and input), prompt, or messages"


def read_prompts(words: Sequence[str], file: Path | None, stdin: TextIO) -> list[Prompt]:
    """The prompts that are asked for: words, or a file's, or the lines of standard input.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are none, both words and a file, or the file is not what its name says.
    """
    if words and file is not None:
        raise ValueError("prompts are given as words and with --file. Give one of them.")
    if words:
        return list(words)
    if file is None:
        if stdin.isatty():
            raise ValueError("no prompt is given. Give it as a word, with --file, or on standard input.")
        return _some(_lines(stdin.read()), "standard input")
    text = read_text(file, "file of prompts", "Give JSON, JSONL, or a text file of one prompt a line.")
    if file.suffix not in (".json", ".jsonl"):
        return _some(_lines(text), str(file))
    return _some([_checked(value, number, file) for number, value in enumerate(_values(text, file), 1)], str(file))


def _lines(text: str) -> list[Prompt]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _some(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise ValueError(f"{where} holds no prompts. Give at least one.")
    return prompts


def _values(text: str, file: Path) -> list[Any]:
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not {file.suffix[1:].upper()}: {error}. Each prompt is {KINDS}.") from error
    return values if isinstance(values, list) else [values]


def _checked(value: Any, number: int, file: Path) -> Prompt:
    texts = [value] if isinstance(value, str) else []
    if isinstance(value, dict):
        names = next((n for n in (("instruction", "input"), ("prompt",)) if n[0] in value), ())
        texts = [value[name] for name in names if name in value]
        messages = value.get("messages")
        if not names and isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return value
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompt {number} of {file} is {json.dumps(value)[:60]}. Each prompt is {KINDS}.")
    return value


def render(prompt: Prompt, template: str, tokenizer: Any) -> tuple[str, bool]:
    """The text that the model is to continue, and whether it is a chat template's, which writes special tokens itself.

    As in training, texts and instructions are laid out by the template, ``prompt`` is taken as it is, and ``messages``
    go through the tokenizer's chat template.

    Raises:
        FileNotFoundError: If there is no such template.
        ValueError: If it is damaged, the tokenizer has no chat template, or that refuses the messages.
    """
    if isinstance(prompt, dict) and "messages" in prompt:
        messages = prompt["messages"]
        answered = messages[-1].get("role") == "assistant"  # as in a file of training data
        return _chat(messages[:-1] if answered else messages, tokenizer), True
    if isinstance(prompt, dict) and "instruction" not in prompt:
        return prompt["prompt"], False
    instruction, given = (prompt, "") if isinstance(prompt, str) else (prompt["instruction"], prompt.get("input", ""))
    if template == "chat":
        content = "\n\n".join(part for part in (instruction, given) if part)
        return _chat([{"role": "user", "content": content}], tokenizer), True
    if template == "raw":
        return f"{instruction}\n{given}" if given else instruction, False
    return load_template(template)(Record(instruction=instruction, input=given, output="")).prompt, False


def _chat(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template. Give --prompt-template short or raw, and no messages.")
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates are programs of the checkpoint's, and raise what they like
        raise ValueError(f"the chat template refuses the messages ({error}). Give --prompt-template raw.") from error


def encode(prompt: Prompt, template: str, tokenizer: Any, *, goes_on: bool = True) -> list[int]:
    """Token ids of a prompt: with what the tokenizer puts in front of a text, without what it puts behind.

    Where the answer does not go on behind the prompt, as that of an encoder-decoder, with that too.
    """
    text, whole = render(prompt, template, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=not whole, verbose=False)["input_ids"])
    if ids[1:] and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text brings one along too
        ids = ids[1:]
    if not goes_on or whole or not ids:
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
