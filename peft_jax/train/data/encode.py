"""Records as token ids and labels.

Labels are `IGNORE` on tokens that are not trained. A text has BOS if the tokenizer or the chat template adds it, never
twice; every text ends with a trained end-of-sequence mark.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.records import (
    AnyRecord,
    Asked,
    Chat,
    Labelled,
    Record,
)
from peft_jax.train.data.template import TEMPLATES, PromptTemplate

IGNORE = -100


class Example(NamedTuple):
    """One row of a batch to be, all int32.

    Attributes:
        input_ids: Token ids (length,).
        labels: Of a causal model the same where they are trained and `IGNORE` elsewhere; of an encoder-decoder the
            answer's token ids (its length,); of a classifier of texts the class ().
        more: The batch's further fields by name, as ``decoder_input_ids``.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    more: Mapping[str, np.ndarray] = MappingProxyType({})

    @property
    def length(self) -> int:
        """Tokens of the longer one of inputs and labels."""
        return max(self.input_ids.size, self.labels.size)


class Encoded(NamedTuple):
    """The examples that fit, and how many were left out because they do not."""

    examples: list[Example]
    too_long: int


def encode(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    template: PromptTemplate = TEMPLATES["short"],
    train_on_inputs: bool = False,
    tasks: int = 0,
) -> Encoded:
    """Tokenize records for a causal language model.

    Of alpaca's fields and of a prompt with its completion, the answer and the end-of-sequence token are trained, and a
    token that straddles prompt and answer too. Of a chat, the assistant's turns are trained, to the mark that ends
    them: by the template's ``{% generation %}`` marks, or else by laying out the chat turn by turn.

    Args:
        records: The records.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token; for chats, with a chat template.
        cutoff_len: Examples of more tokens are left out and counted.
        template: Lays out alpaca's fields.
        train_on_inputs: Train all tokens instead.
        tasks: How many tasks a prompt has, of which each record names one; 0 where records need to name none.

    Returns:
        The examples in the order of the records.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token or no chat template where one is needed, the template
            cannot lay out a chat, a record names no task where it has to, or no example fits.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> from peft_jax.train.data.records import Completion
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> [example], _ = encode([Completion("1, 2,", " 3")], tokenizer, cutoff_len=32)
        >>> tokenizer.decode(example.labels[example.labels != IGNORE])
        ' 3<|eos|>'
    """
    check_eos(tokenizer)
    examples = []
    for number, record in enumerate(records, 1):
        if isinstance(record, Chat):
            ids, trained = _chat(record, tokenizer, f"chat {number}")
        elif isinstance(record, Labelled):
            raise ValueError(f"record {number} has a label, and a language model learns to write. Give other data.")
        else:
            laid_out = template(record) if isinstance(record, Record) else record
            ids, start = encode_completion(laid_out.prompt, laid_out.completion, tokenizer)
            trained = [position >= start for position in range(len(ids))]
        if train_on_inputs:
            trained = [True] * len(ids)
        examples.append(_example(ids, trained, task_field(record, number, tasks)))
    return kept(examples, cutoff_len)


def _example(ids: Sequence[int], trained: Sequence[bool], more: Mapping[str, np.ndarray]) -> Example:
    input_ids = np.asarray(ids, np.int32)
    labels = np.where(np.asarray(trained, bool), input_ids, IGNORE).astype(np.int32)
    labels[:1] = IGNORE  # nothing predicts the first token
    return Example(input_ids, labels, more)


def check_eos(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer has no token that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer could end. Name one in tokenizer_config.json.")


def kept(examples: Sequence[Example], cutoff_len: int) -> Encoded:
    """The examples that are not too long.

    Raises:
        ValueError: If there are none.
    """
    fitting = [example for example in examples if example.length <= cutoff_len]
    if not fitting:
        shortest = min((example.length for example in examples), default=0)
        raise ValueError(
            f"none of {len(examples)} examples fits into {cutoff_len} tokens. Raise cutoff_len to {shortest} or more."
        )
    return Encoded(fitting, len(examples) - len(fitting))


def task_field(record: Asked, number: int, tasks: int) -> dict[str, np.ndarray]:
    """Return a row's ``task_ids`` for a prompt of ``tasks`` tasks; an empty dict for 0.

    Raises:
        ValueError: If the record names none of them.

    Example:
        >>> task_field(Asked(task_id=1), 1, tasks=2)
        {'task_ids': array(1, dtype=int32)}
    """
    if not tasks:
        return {}
    found = record.task_id
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < tasks:
        said = "no task_id" if found is None else f"the task_id {found!r}"
        raise ValueError(f"record {number} has {said}, and the prompt has {tasks} tasks. Give 0 to {tasks - 1}.")
    return {"task_ids": np.asarray(found, np.int32)}


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of both texts and EOS, and the index of the first one that the prompt alone does not have."""
    alone = _one_bos(tokenizer(prompt, verbose=False)["input_ids"], tokenizer)
    ids = _one_bos(tokenizer(prompt + completion, verbose=False)["input_ids"], tokenizer)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    same = (number for number, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other)
    return ids, min(next(same, len(alone)), len(ids) - 1)


def _one_bos(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The ids without a second BOS, where a text brings one along and the tokenizer puts another."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return list(ids[1:]) if bos is not None and list(ids[:2]) == [bos, bos] else list(ids)


def _chat(record: Chat, tokenizer: Tokenizer, where: str) -> tuple[list[int], list[bool]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, which messages need. Put chat_template.jinja beside the weights, or "
            "give data with prompt and completion."
        )
    messages = list(record.messages)
    try:
        if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
            found = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, trained = list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
        else:
            ids, trained = _by_turns(messages, tokenizer, where)
    except ValueError:
        raise
    except Exception as error:  # a template can raise anything: jinja2's errors, those of its own raise_exception
        raise ValueError(f"the tokenizer's chat template refuses {where}: {error}.") from error
    return _ended(ids, trained, tokenizer)


def _ended(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids, so that every learned turn is learned to its end: the EOS after it, or one put behind the last."""
    for position in range(1, len(ids)):
        trained[position] |= trained[position - 1] and ids[position] == tokenizer.eos_token_id != ids[position - 1]
    last = max((position for position, one in enumerate(trained) if one), default=-1)
    mark = last
    while mark > 0 and not tokenizer.decode([ids[mark]]).strip():  # white space after the mark
        mark -= 1
    if last < 0 or ids[mark] in {tokenizer.eos_token_id, *getattr(tokenizer, "all_special_ids", ())}:
        return ids, trained
    return [*ids[: last + 1], tokenizer.eos_token_id], [*trained[: last + 1], True]


def _by_turns(messages: list[Mapping[str, Any]], tokenizer: Tokenizer, where: str) -> tuple[list[int], list[bool]]:
    """Ids of a chat, and which of them the assistant's turns add to what stands before them."""

    def layout(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    full, spans = layout(len(messages)), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = layout(index, prompt=True) if index else full[: full.find(message["content"])]
            after = layout(index + 1)
            if not (full.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template lays out message {index + 1} of {where} differently when others follow, so "
                    "the trained tokens cannot be found. Mark the assistant's text in it with {% generation %}."
                )
            spans.append((len(before), len(after)))
    found = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = found["offset_mapping"]
    trained = []
    for start, end in offsets:
        trained.append(any(start < after and before < end for before, after in spans))
    return list(found["input_ids"]), trained
