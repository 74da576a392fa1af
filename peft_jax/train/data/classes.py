"""Texts and their classes: names, token ids, and a model's accuracy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.pytree import PyTree
from peft_jax.models.handles.label_losses import SINGLE
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.batch_loss import Apply, logits_of
from peft_jax.train.data.batches import Batch
from peft_jax.train.data.encode import (
    IGNORE,
    Encoded,
    Example,
    kept,
    task_field,
)
from peft_jax.train.data.label_kinds import label_array, names_of
from peft_jax.train.data.long_examples import Long, check_not_split
from peft_jax.train.data.records import AnyRecord, Labelled, all_of
from peft_jax.train.data.token_rows import Watch, chunks, paired_rows
from peft_jax.train.losses import cross_entropy

ScoringStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]


def class_names(records: Sequence[AnyRecord]) -> dict[int, str]:
    """The names of the classes that occur, by number: names in their order, or ``LABEL_0`` and so on for numbers.

    Raises:
        ValueError: If records have names and numbers, or there is one class alone.

    Example:
        >>> class_names([Labelled("Well done.", "good"), Labelled("Oh no.", "bad")])
        {0: 'bad', 1: 'good'}
        >>> class_names([Labelled("Well done.", 2)])
        {0: 'LABEL_0', 1: 'LABEL_1', 2: 'LABEL_2'}
    """
    return names_of(labelled(records), SINGLE)


def labelled(records: Sequence[AnyRecord]) -> list[Labelled]:
    """The records as what they are.

    Raises:
        ValueError: If one is of another format.
    """
    return all_of(records, Labelled, "A classifier of texts learns")


def encode_texts(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    id2label: Mapping[int, str],
    problem: str = SINGLE,
    token_types: bool = False,
    tasks: int = 0,
    long: Long = "drop",
    watch: Watch = iter,
) -> Encoded:
    """Tokenize texts, and pairs of texts, with the number of their class.

    Args:
        records: Texts with their labels.
        tokenizer: A `transformers` tokenizer.
        cutoff_len: The most tokens of a text or a pair.
        id2label: Names of the classes by number, from 0 on.
        problem: The kind of labels, by transformers' ``problem_type``.
        token_types: Whether the model distinguishes two texts of a row by ``token_type_ids``.
        tasks: As `peft_jax.train.data.encode` takes it.
        long: Whether longer texts are left out (``drop``) or cut as the tokenizer cuts them (``truncate``), with the
            special tokens around them.
        watch: As `peft_jax.train.data.encode` takes it.

    Returns:
        The examples in the order of the records; labels are int32 of shape (), or float32 of shape (outputs,)
        for several classes of a text and for a regression.

    Raises:
        ValueError: If a record is of another format, has another label or names no task where it has to, or no example
            fits.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> [example], _ = encode_texts([Labelled("Oh no.", "bad")], tokenizer, cutoff_len=8, id2label={0: "bad"})
        >>> int(example.labels)
        0
    """
    found = labelled(records)
    check_not_split(long, "a classifier of texts")
    typed = token_types and any(record.text_pair for record in found)
    examples: list[Example] = []
    shortened = 0
    for part in chunks(len(found), watch):
        texts = [(record.text, record.text_pair) if record.text_pair else (record.text,) for record in found[part]]
        rows = paired_rows(texts, tokenizer, return_token_type_ids=typed)
        for number, (record, row) in enumerate(zip(found[part], rows, strict=True), part.start + 1):
            label = label_array(record.label, problem, id2label, number)
            if long == "truncate" and len(row["input_ids"]) > cutoff_len:
                cut = {"truncation": True, "max_length": cutoff_len, "return_token_type_ids": typed}
                [row] = paired_rows([texts[number - 1 - part.start]], tokenizer, **cut)
                shortened += 1
            more = task_field(record, number, tasks)
            if typed:
                more["token_type_ids"] = np.asarray(row["token_type_ids"], np.int32)
            ids = np.asarray(row["input_ids"], np.int32)
            examples.append(Example(ids, label, more))
    return kept(examples, cutoff_len, long, shortened)


def make_scoring_step(apply: Apply) -> ScoringStep:
    """Build the compiled step ``(params, batch) -> (summed loss, right answers, number of labels)``, without dropout.

    Args:
        apply: As `peft_jax.train.make_training_step` takes it; its logits are (batch, classes).
    """

    def step(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, labels = logits_of(apply, params, batch), jnp.asarray(batch["labels"])
        loss, count = cross_entropy(logits, labels, next_token=False)
        right = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels) & (labels != IGNORE)
        return loss, jnp.sum(right, dtype=jnp.int32), count

    return jax.jit(step)


def score(step: ScoringStep, params: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss in nats and accuracy over the batches; ``step`` is from `make_scoring_step`."""
    losses, rights, counts = [], [], []
    for batch in batches:
        loss, right, count = step(params, batch)
        losses.append(float(loss))
        rights.append(float(right))
        counts.append(float(count))
    total = sum(counts)
    return {"loss": sum(losses) / total, "accuracy": sum(rights) / total}
