"""Layouts of alpaca's fields: templates by name and in alpaca-lora's files, and the tokenizer's chat template."""

import dataclasses
import string
from collections.abc import Iterable
from pathlib import Path

from peft_jax.core.text_files import read_object
from peft_jax.train.data.records import Chat, Completion, Record


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """The text before the answer, with ``{instruction}`` and ``{input}`` in it.

    Attributes:
        prompt_input: For records with an input.
        prompt_no_input: For records without.

    Example:
        >>> PromptTemplate("{instruction} {input}: ", "{instruction}: ")(Record("Reverse", "abc", "cba"))
        Completion(prompt='Reverse abc: ', completion='cba')
    """

    prompt_input: str
    prompt_no_input: str

    def __call__(self, record: Record) -> Completion:
        """Lay out a record: a system prompt, earlier questions with their answers, and then its own question."""
        before = [record.system] if record.system else []
        for question, answer in record.history:
            before.append(self._prompt(question, "") + answer)
        return Completion("\n\n".join([*before, self._prompt(record.instruction, record.input)]), record.output)

    def _prompt(self, instruction: str, input: str) -> str:
        text = self.prompt_input if input else self.prompt_no_input
        return text.format(instruction=instruction, input=input)


@dataclasses.dataclass(frozen=True)
class ChatLayout:
    """A chat of one question and its answer, for the tokenizer's chat template to lay out.

    Example:
        >>> ChatLayout()(Record("Reverse.", "", "cba")).messages[0]
        {'role': 'user', 'content': 'Reverse.'}
    """

    def __call__(self, record: Record) -> Chat:
        """Lay out a record; answers to earlier questions are given, not learned."""
        turns = [{"role": "system", "content": record.system}] if record.system else []
        given = []
        for question, answer in record.history:
            given.append(len(turns) + 1)
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        parts = [part for part in (record.instruction, record.input) if part]
        turns.append({"role": "user", "content": "\n\n".join(parts)})
        turns.append({"role": "assistant", "content": record.output})
        return Chat(tuple(turns), given=tuple(given), task_id=record.task_id)


Layout = PromptTemplate | ChatLayout

CHAT = ChatLayout()
RAW = PromptTemplate("{instruction}\n{input}", "{instruction}")  # nothing around the texts

TEMPLATES = {
    "short": PromptTemplate(
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "alpaca": PromptTemplate(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
}


def load_layout(name_or_file: str | Path) -> Layout:
    """As `load_template`, with the further names ``chat`` (the tokenizer's chat template) and ``raw`` (nothing).

    Raises:
        FileNotFoundError: If it is neither a name nor a file.
        ValueError: If a file is damaged.

    Example:
        >>> load_layout("chat")
        ChatLayout()
    """
    named: dict[str, Layout] = {**TEMPLATES, "chat": CHAT, "raw": RAW}
    name = str(name_or_file)
    return named[name] if name in named else _read_template(Path(name_or_file), named)


def load_template(name_or_file: str | Path) -> PromptTemplate:
    r"""Return the template of a name (``short``, ``alpaca``), or read a JSON file in alpaca-lora's format.

    Such a file has the texts ``prompt_input`` and ``prompt_no_input``; its other fields are descriptions.

    Raises:
        FileNotFoundError: If it is neither a name nor a file.
        ValueError: If the file does not hold the two texts, or they name other fields.

    Example:
        >>> load_template("short").prompt_no_input
        '### Instruction:\n{instruction}\n\n### Response:\n'
    """
    name = str(name_or_file)
    return TEMPLATES[name] if name in TEMPLATES else _read_template(Path(name_or_file), TEMPLATES)


def _read_template(file: Path, named: Iterable[str]) -> PromptTemplate:
    """A file's template; where there is no such file, the error lists the names that could be given instead."""
    rule = "It needs the texts prompt_input and prompt_no_input."
    if not file.is_file():
        raise FileNotFoundError(f"no prompt template '{file}'. Give {', '.join(named)} or a JSON file. {rule}")
    found = read_object(file, "prompt template", rule)
    return PromptTemplate(*(_checked(found.get(name), file, rule) for name in ("prompt_input", "prompt_no_input")))


def _checked(text: object, file: Path, rule: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"the prompt template {file} lacks a text. {rule}")
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"the prompt template {file} has a brace too many or too few: {error}.") from error
    if not {"instruction"} <= names <= {"instruction", "input"}:
        raise ValueError(
            f"the prompt template {file} names the fields {sorted(names)}. Name {{instruction}} and perhaps {{input}}, "
            "and double other braces."
        )
    return text
