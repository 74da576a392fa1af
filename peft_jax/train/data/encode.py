"""Records as token ids and labels.

Labels are `IGNORE` on tokens that are not trained. A text has BOS if the tokenizer or the chat template adds it, never
twice; every text ends with a trained end-of-sequence mark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.chats import ChatMasks, encode_chats, render_chat
from peft_jax.train.data.conversations import check_written
from peft_jax.train.data.long_examples import IGNORE as IGNORE
from peft_jax.train.data.long_examples import Encoded as Encoded
from peft_jax.train.data.long_examples import Example as Example
from peft_jax.train.data.long_examples import Long
from peft_jax.train.data.long_examples import count_labels as count_labels
from peft_jax.train.data.long_examples import kept as kept
from peft_jax.train.data.records import (
    AnyRecord,
    Asked,
    Chat,
    Completion,
    Labelled,
    PlainText,
    Question,
    Record,
    Tagged,
)
from peft_jax.train.data.template import TEMPLATES, Layout
from peft_jax.train.data.token_rows import Watch, chunks, common_start, token_rows


def encode(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    template: Layout = TEMPLATES["short"],
    train_on_inputs: bool = False,
    tasks: int = 0,
    masks: ChatMasks | None = None,
    long: Long = "drop",
    watch: Watch = iter,
) -> Encoded:
    """Tokenize records for a causal language model.

    Of alpaca's fields and of a prompt with its completion, the answer and the end-of-sequence token are trained, and a
    token that straddles prompt and answer too. A plain text is trained whole. Of a chat, the assistant's turns are
    trained, to the mark that ends them, as `peft_jax.train.data.chats` finds them.

    Args:
        records: The records.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token; for chats, with a chat template.
        cutoff_len: The most tokens of an example.
        template: Lays out alpaca's fields.
        train_on_inputs: Train all tokens instead.
        tasks: How many tasks an adapter has, of which each record names one; 0 where records need to name none.
        masks: Gets what was learned of chats, and how that was found.
        long: Whether longer examples are left out (``drop``), cut (``truncate``) or split into several (``split``).
        watch: Wraps the sequence of chunks of records, as a progress bar does.

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
    longest = cutoff_len if long == "truncate" else None
    examples: list[Example] = []
    for part in chunks(len(records), watch):
        first = part.start + 1
        laid_out = []
        for number, record in enumerate(records[part], first):
            laid_out.append(_laid_out(record, template, number))
        for number, (ids, trained) in enumerate(_rows(laid_out, first, tokenizer, masks, longest), first):
            if train_on_inputs:
                trained = [True] * len(ids)
            examples.append(_example(ids, trained, task_field(records[number - 1], number, tasks)))
    return kept(examples, cutoff_len, long)


def _laid_out(record: AnyRecord, template: Layout, number: int) -> Completion | Chat:
    """A record as a chat, or as the text that is given and the text that is learned."""
    if isinstance(record, Labelled | Tagged | Question):
        raise ValueError(f"record {number} has a label, and a language model learns to write. Give other data.")
    if isinstance(record, Record):
        return template(record)
    if isinstance(record, PlainText):
        return Completion("", record.text)
    return record


def _rows(
    records: Sequence[Completion | Chat], first: int, tokenizer: Tokenizer, masks: ChatMasks | None, longest: int | None
) -> list[tuple[Sequence[int], Any]]:
    """Ids of each record, and which of them are trained; ``first`` is the number of the first record."""
    texts, rendered = [], []
    for number, record in enumerate(records, first):
        if isinstance(record, Chat):
            rendered.append(render_chat(record, tokenizer, f"chat {number}"))
            check_written(record, str(tokenizer.chat_template), f"chat {number}")
        else:
            texts.append(record)
    chats = iter(encode_chats(rendered, tokenizer, masks))
    completions = iter(encode_completions(texts, tokenizer, longest))
    rows: list[tuple[Sequence[int], Any]] = []
    for record in records:
        if isinstance(record, Chat):
            rows.append(next(chats))
        else:
            ids, start = next(completions)
            rows.append((ids, np.arange(len(ids)) >= start))
    return rows


def _example(ids: Sequence[int], trained: Any, more: Mapping[str, np.ndarray]) -> Example:
    input_ids = np.asarray(ids, np.int32)
    labels = np.where(np.asarray(trained, bool), input_ids, np.int32(IGNORE))
    labels[:1] = IGNORE  # nothing predicts the first token
    return Example(input_ids, labels, more)


def check_eos(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer has no token that ends an answer."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so no answer could end. Name one in tokenizer_config.json.")


def task_field(record: Asked, number: int, tasks: int) -> dict[str, np.ndarray]:
    """Return a row's ``task_ids`` for an adapter of ``tasks`` tasks; an empty dict for 0.

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
        raise ValueError(f"record {number} has {said}, and the adapter has {tasks} tasks. Give 0 to {tasks - 1}.")
    return {"task_ids": np.asarray(found, np.int32)}


def encode_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of both texts and EOS, and the index of the first one that the prompt alone does not have."""
    [found] = encode_completions([Completion(prompt, completion)], tokenizer)
    return found


def encode_completions(
    records: Sequence[Completion], tokenizer: Tokenizer, longest: int | None = None
) -> list[tuple[list[int], int]]:
    """As `encode_completion`, for many.

    Args:
        records: The prompts and what follows them.
        tokenizer: The tokenizer.
        longest: The length to which rows are cut afterwards; of longer ones the beginning alone is encoded.
    """
    needed = None if longest is None else longest + 1
    prompts = token_rows([record.prompt for record in records], tokenizer, needed)
    wholes = token_rows([record.prompt + record.completion for record in records], tokenizer, needed)
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id  # each takes a tokenizer microseconds
    rows = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        alone, ids = _one_bos(prompt.ids, bos), _one_bos(whole.ids, bos)
        if whole.is_whole and (not ids or ids[-1] != eos):
            ids.append(eos)
        rows.append((ids, min(common_start(alone, ids), len(ids) - 1)))
    return rows


def _one_bos(ids: list[int], bos: int | None) -> list[int]:
    """The ids without a second BOS, where a text brings one along and the tokenizer puts another."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
