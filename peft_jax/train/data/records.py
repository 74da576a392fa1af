"""Training data as people have it: files of alpaca records, of prompts with completions, of chats, of labelled texts.

A file holds one of the four formats. It is a JSON list of objects, or JSONL, one object a line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core.articles import article
from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.core.text_files import read_text

FORMATS = "instruction and output (and perhaps input), or prompt and completion, or messages, or text and label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Fields that records of all formats may have.

    Attributes:
        task_id: The number of the record's task, for prompts that have several; as the file has it.
    """

    task_id: Any = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Record(Asked):
    """One instruction and its answer, with alpaca's field names.

    Attributes:
        instruction: What to do.
        input: What to do it with; may be empty.
        output: The answer.
    """

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The text before the answer, without the ``Input`` section when `input` is empty.

        Example:
            >>> print(Record(instruction="Reverse.", input="abc", output="cba").prompt)
            ### Instruction:
            Reverse.
            <BLANKLINE>
            ### Input:
            abc
            <BLANKLINE>
            ### Response:
            <BLANKLINE>
        """
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n"


@dataclasses.dataclass(frozen=True)
class Completion(Asked):
    """A prompt and what follows it, as they are: nothing is put between them.

    Attributes:
        prompt: The given text.
        completion: The text to learn.
    """

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Chat(Asked):
    """A conversation, to be laid out by the tokenizer's chat template.

    Attributes:
        messages: Turns, each with a role and its content. The turns of role ``assistant`` are learned.
        tools: The tools that the model may call, as JSON schemas that transformers' chat templates take.
        given: Positions of the assistant's turns that are context alone and are not learned.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    given: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Labelled(Asked):
    """A text, or two, and its class.

    Attributes:
        text: The text.
        label: Its class, by name or number.
        text_pair: What stands beside the text, as a hypothesis beside its premise; empty for none.
    """

    text: str
    label: str | int
    text_pair: str = ""


AnyRecord = Record | Completion | Chat | Labelled


def read_data(file: str | Path) -> list[AnyRecord]:
    """Read a JSON or JSONL file whose records have alpaca's fields, or prompt and completion, or messages, or labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON, is empty, or its records are of no known format or of several.

    Example:
        >>> Path("data.jsonl").write_text('{"prompt": "1, 2,", "completion": " 3"}')
        39
        >>> read_data("data.jsonl")
        [Completion(prompt='1, 2,', completion=' 3')]
    """
    return to_records(_read(Path(file)), str(file))


def read_records(file: str | Path) -> list[Record]:
    """Read a file by `read_data` whose records have alpaca's fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `read_data` does, or if the records are of another format.

    Example:
        >>> Path("data.jsonl").write_text('{"instruction": "Reverse.", "input": "abc", "output": "cba"}')
        60
        >>> read_records("data.jsonl")
        [Record(instruction='Reverse.', input='abc', output='cba')]
    """
    records = []
    for record in read_data(file):
        if not isinstance(record, Record):
            raise ValueError(
                f"the records of {file} have {named(type(record))}, not {named(Record)}. Read them with read_data."
            )
        records.append(record)
    return records


def to_records(objects: Sequence[Any], source: str) -> list[AnyRecord]:
    """Turn parsed objects into records; ``source`` names where they come from in errors.

    Raises:
        ValueError: If there are none, or they are of no known format or of several.
    """
    if not objects:
        raise ValueError(f"{source} holds no records. Give at least one with {FORMATS}.")
    records = [_record(value, f"record {number} of {source}") for number, value in enumerate(objects, 1)]
    for number, record in enumerate(records, 1):
        if type(record) is not type(records[0]):
            raise ValueError(
                f"record {number} of {source} has {named(type(record))}, but the first has {named(type(records[0]))}."
                " Give one format a file."
            )
    return records


_NAMES: dict[type, str] = {
    Record: "instruction and output",
    Completion: "prompt and completion",
    Chat: "messages",
    Labelled: "text and label",
}


def named(*kinds: type) -> str:
    """The fields of records of these classes.

    Example:
        >>> named(Record, Completion)
        'instruction and output, or prompt and completion'
    """
    return ", or ".join(_NAMES[kind] for kind in kinds)


def _record(value: Any, where: str) -> AnyRecord:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is of type {type(value).__name__}, not an object. Each record needs {FORMATS}.")
    record = _by_fields(value, where)
    if "task_id" in value:
        return dataclasses.replace(record, task_id=value["task_id"])
    return record


def _by_fields(value: dict[str, Any], where: str) -> AnyRecord:
    rule = f"Each record needs {FORMATS}."
    if "messages" in value:
        return _chat(value["messages"], where)
    if "completion" in value or "prompt" in value:
        return Completion(**_texts(value, ("prompt", "completion"), (), where, rule))
    if "instruction" in value or "output" in value:
        return _alpaca(value, where)
    if "label" in value:
        return _labelled(value, where)
    raise ValueError(f"{where} lacks instruction and output; it has {', '.join(value) or 'no fields'}. {rule}")


def _alpaca(value: dict[str, Any], where: str) -> Record:
    rule = "Each record needs the fields instruction and output, and may have input."
    return Record(**_texts(value, ("instruction", "output"), ("input",), where, rule))


def _labelled(value: dict[str, Any], where: str) -> Labelled:
    rule = "Each record needs the fields text and label, and may have text_pair."
    texts = _texts(value, ("text",), ("text_pair",), where, rule)
    label = value["label"]
    if not isinstance(label, str | int) or isinstance(label, bool) or (isinstance(label, int) and label < 0):
        raise ValueError(f"{where} has the label {label!r}. Give the name of a class, or its number from 0 on.")
    return Labelled(texts["text"], label, texts["text_pair"])


def _texts(
    value: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str], where: str, rule: str
) -> dict[str, str]:
    missing = [name for name in needed if name not in value]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}; it has {', '.join(value) or 'no fields'}. {rule}")
    fields = {name: value[name] for name in needed} | {name: value.get(name) or "" for name in optional}
    for name, content in fields.items():
        if not isinstance(content, str):
            raise ValueError(f"{where} has {article(name)} of type {type(content).__name__}, not text. {rule}")
    return fields


def _chat(messages: Any, where: str) -> Chat:
    rule = 'Messages are a list of objects like {"role": "user", "content": "Hello"}.'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} has messages that are no list, or an empty one. {rule}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"message {number} in {where} lacks a role or a content that is text. {rule}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no message of role assistant, so there is nothing to learn in it. {rule}")
    return Chat(tuple(messages))


def _read(file: Path) -> list[Any]:
    """Return the values in a file: a JSON list's items, or one value a line."""
    text = read_text(file, "data file", f"Give a JSON or JSONL file of records with {FORMATS}.")
    if not text.strip():
        raise ValueError(f"{file} is empty. Give at least one record with {FORMATS}.")
    return _parse(text, file)


def _parse(text: str, file: Path) -> list[Any]:
    hint = "Give a JSON list of objects, or one JSON object a line."
    if text.lstrip().startswith("["):
        try:
            return list(parse_json(text))
        except JSONError as error:
            raise ValueError(f"{file} is not JSON: {error}. {hint}") from error
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(parse_json(line))
            except JSONError as error:
                raise ValueError(f"{file} is not JSON in line {number}: {error.reason}. {hint}") from error
    return values
