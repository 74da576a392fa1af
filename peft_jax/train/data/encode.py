"""Records as token ids and labels.

Labels are `IGNORE` on tokens that are not trained. A text has BOS if the tokenizer or the chat template adds it, never
twice; every text ends with a trained end-of-sequence mark.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.chats import ChatMasks, encode_chats, render_chat
from peft_jax.train.data.records import (
    AnyRecord,
    Asked,
    Chat,
    Labelled,
    Record,
)
from peft_jax.train.data.template import TEMPLATES, Layout

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
    template: Layout = TEMPLATES["short"],
    train_on_inputs: bool = False,
    tasks: int = 0,
    masks: ChatMasks | None = None,
) -> Encoded:
    """Tokenize records for a causal language model.

    Of alpaca's fields and of a prompt with its completion, the answer and the end-of-sequence token are trained, and a
    token that straddles prompt and answer too. Of a chat, the assistant's turns are trained, to the mark that ends
    them, as `peft_jax.train.data.chats` finds them.

    Args:
        records: The records.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token; for chats, with a chat template.
        cutoff_len: Examples of more tokens are left out and counted.
        template: Lays out alpaca's fields.
        train_on_inputs: Train all tokens instead.
        tasks: How many tasks a prompt has, of which each record names one; 0 where records need to name none.
        masks: Gets what was learned of chats, and how that was found.

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
    laid_out = [template(record) if isinstance(record, Record) else record for record in records]
    rendered = []
    for number, record in enumerate(laid_out, 1):
        if isinstance(record, Chat):
            rendered.append(render_chat(record, tokenizer, f"chat {number}"))
    chats = iter(encode_chats(rendered, tokenizer, masks))
    examples = []
    for number, record in enumerate(laid_out, 1):
        if isinstance(record, Labelled):
            raise ValueError(f"record {number} has a label, and a language model learns to write. Give other data.")
        if isinstance(record, Chat):
            ids, trained = next(chats)
        else:
            ids, start = encode_completion(record.prompt, record.completion, tokenizer)
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
