"""Instruction data: files with alpaca's fields, its short prompt, and batches of one fixed length.

The prompt is the short one of alpaca-lora and Chinese-Vicuna, without a preamble. Only the answer and the
end-of-sequence token are trained: labels are `IGNORE` on the prompt and on the padding.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import grain
import numpy as np

IGNORE = -100
LENGTH_STEP = 32
FIELDS = "instruction, input and output"


class Tokenizer(Protocol):
    """What is used of a `transformers` tokenizer."""

    eos_token_id: Any

    def __call__(self, text: str, *, verbose: bool) -> Any:
        """Token ids of a text under the key ``input_ids``."""


class Batch(TypedDict):
    """Examples of one length, each field int32 of shape (batch, length)."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
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
class Tokens:
    """Tokenized examples, padded on the right to one length; a random-access source for `grain`.

    Attributes:
        input_ids: Token ids, int32 (examples, length).
        attention_mask: 1 on tokens and 0 on padding, int32 (examples, length).
        labels: `input_ids` where a token is trained and `IGNORE` elsewhere, int32 (examples, length).
        too_long: How many examples were left out because they exceed the cutoff.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    too_long: int

    @property
    def length(self) -> int:
        """Tokens per example, padding included."""
        return int(self.input_ids.shape[1])

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.input_ids)

    def __getitem__(self, index: Any) -> Batch:
        """Return the example at an index, or the batch at a slice."""
        return Batch(
            input_ids=self.input_ids[index], attention_mask=self.attention_mask[index], labels=self.labels[index]
        )


def read_records(file: str | Path) -> list[Record]:
    """Read a JSON file (a list of objects) or a JSONL file (an object a line) with alpaca's fields.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON, is empty, or a record lacks `instruction` or `output`.

    Example:
        >>> Path("data.jsonl").write_text('{"instruction": "Reverse.", "input": "abc", "output": "cba"}')
        60
        >>> read_records("data.jsonl")
        [Record(instruction='Reverse.', input='abc', output='cba')]
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no data file at {file}. Give a JSON or JSONL file of records with {FIELDS}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text. Give a JSON or JSONL file.") from error
    if not text.strip():
        raise ValueError(f"{file} is empty. Give at least one record with {FIELDS}.")
    objects = _parse(text, file)
    if not objects:
        raise ValueError(f"{file} holds no records. Give at least one with {FIELDS}.")
    return [_record(value, f"record {number} of {file}") for number, value in enumerate(objects, 1)]


def _parse(text: str, file: Path) -> list[Any]:
    """Return the values in a text: a JSON list's items, or one value a line."""
    hint = "Give a JSON list of objects, or one JSON object a line."
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}. {hint}") from error
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not JSON in line {number}: {error.msg}. {hint}") from error
    return values


def _record(value: Any, where: str) -> Record:
    """Turn a parsed object into a record; `where` names it in errors."""
    rule = "Each record needs the fields instruction and output, and may have input."
    if not isinstance(value, dict):
        raise ValueError(f"{where} is of type {type(value).__name__}, not an object. {rule}")
    missing = [name for name in ("instruction", "output") if name not in value]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}; it has {', '.join(value) or 'no fields'}. {rule}")
    fields = {name: value.get(name, "") for name in ("instruction", "input", "output")}
    for name, content in fields.items():
        if not isinstance(content, str):
            raise ValueError(f"{where} has a {name} of type {type(content).__name__}, not text. {rule}")
    return Record(**fields)


def tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, *, cutoff_len: int = 256, pad_to: int | None = None
) -> Tokens:
    """Tokenize records into examples of one length.

    BOS is there if the tokenizer puts it there, EOS always ends the answer. A token is trained unless the prompt alone
    has it too, so one that straddles prompt and answer is.

    Args:
        records: The records.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        cutoff_len: Examples of more tokens are left out and counted in `Tokens.too_long`.
        pad_to: The common length. By default that of the longest kept example, rounded up to a multiple of 32.

    Returns:
        The examples in the order of the records.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or no example fits.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer could end. Name one in tokenizer_config.json.")
    cutoff_len = min(cutoff_len, pad_to or cutoff_len)
    encoded = [_encode(record, tokenizer) for record in records]
    kept = [(ids, start) for ids, start in encoded if len(ids) <= cutoff_len]
    if not kept:
        shortest = min((len(ids) for ids, _ in encoded), default=0)
        raise ValueError(
            f"none of {len(records)} examples fits into {cutoff_len} tokens. Raise cutoff_len to {shortest} or more."
        )
    length = pad_to or min(cutoff_len, _rounded_up(max(len(ids) for ids, _ in kept)))
    shape = (len(kept), length)
    input_ids = np.full(shape, tokenizer.eos_token_id, np.int32)
    attention_mask = np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    for row, (ids, start) in enumerate(kept):
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = ids[start:]
    return Tokens(input_ids, attention_mask, labels, too_long=len(records) - len(kept))


def _encode(record: Record, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and the index of the first one that the prompt alone does not have."""
    prompt = tokenizer(record.prompt, verbose=False)["input_ids"]
    ids = list(tokenizer(record.prompt + record.output, verbose=False)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    same = (number for number, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other)
    return ids, min(next(same, len(prompt)), len(ids) - 1)


def _rounded_up(length: int) -> int:
    """Return the next multiple of `LENGTH_STEP`."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def tokenize_prompts(records: Sequence[Record], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of the prompts alone, padded on the left for generation.

    Returns:
        Two int32 arrays (records, length), where length is a multiple of 32.
    """
    prompts = [_encode(dataclasses.replace(record, output=""), tokenizer)[0][:-1] for record in records]
    length = _rounded_up(max(map(len, prompts)))
    input_ids = np.full((len(prompts), length), tokenizer.eos_token_id, np.int32)
    attention_mask = np.zeros((len(prompts), length), np.int32)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
    return input_ids, attention_mask


def training_batches(data: Tokens, batch_size: int, *, seed: int) -> Sequence[Batch]:
    """Lay out an endless run: item `n` is the batch of step `n`, the same each time it is asked for.

    Every epoch is shuffled anew; a batch may span two.
    """
    return grain.MapDataset.source(data).seed(seed).shuffle().repeat().batch(batch_size)


def evaluation_batches(data: Tokens, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, in order; the last batch is filled up with rows that have no label."""
    for start in range(0, len(data), batch_size):
        batch = data[start : start + batch_size]
        missing = ((0, start + batch_size - min(start + batch_size, len(data))), (0, 0))
        yield Batch(
            input_ids=np.pad(batch["input_ids"], missing),
            attention_mask=np.pad(batch["attention_mask"], missing, constant_values=1),
            labels=np.pad(batch["labels"], missing, constant_values=IGNORE),
        )
