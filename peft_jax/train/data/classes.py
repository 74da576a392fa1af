"""Texts and their classes: names, token ids, and a model's accuracy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import numbered_labels
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
from peft_jax.train.data.long_examples import Long, check_not_split
from peft_jax.train.data.records import AnyRecord, Labelled, named
from peft_jax.train.data.token_rows import Watch, chunks, paired_rows
from peft_jax.train.losses import cross_entropy

MOST = 2**16  # classes that are named by numbers
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
    labels = [record.label for record in _labelled(records)]
    texts = sorted({label for label in labels if isinstance(label, str)})
    numbers = [label for label in labels if isinstance(label, int)]
    if texts and numbers:
        raise ValueError(f"records have labels that are names ({texts[0]!r}) and numbers ({numbers[0]}). Give names.")
    if numbers and max(numbers) >= MOST:
        raise ValueError(f"a record has the label {max(numbers)}. Number classes from 0 on, below {MOST}.")
    names = dict(enumerate(texts)) or numbered_labels(max(numbers) + 1)
    if len(names) < 2:
        raise ValueError(f"all records have the label {labels[0]!r}. Give records of two classes or more.")
    return names


def _labelled(records: Sequence[AnyRecord]) -> list[Labelled]:
    for number, record in enumerate(records, 1):
        if not isinstance(record, Labelled):
            raise ValueError(
                f"record {number} has {named(type(record))}. A classifier of texts learns from {named(Labelled)}."
            )
    return list(records)  # type: ignore[arg-type]


def encode_texts(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    id2label: Mapping[int, str],
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
        token_types: Whether the model distinguishes two texts of a row by ``token_type_ids``.
        tasks: As `peft_jax.train.data.encode` takes it.
        long: Whether longer texts are left out (``drop``) or cut as the tokenizer cuts them (``truncate``), with the
            special tokens around them.
        watch: As `peft_jax.train.data.encode` takes it.

    Returns:
        The examples in the order of the records; labels are int32 of shape ().

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
    numbers = {name: number for number, name in id2label.items()}
    labelled = _labelled(records)
    check_not_split(long, "a classifier of texts")
    typed = token_types and any(record.text_pair for record in labelled)
    examples: list[Example] = []
    shortened = 0
    for part in chunks(len(labelled), watch):
        texts = [(record.text, record.text_pair) if record.text_pair else (record.text,) for record in labelled[part]]
        rows = paired_rows(texts, tokenizer, return_token_type_ids=typed)
        for number, (record, row) in enumerate(zip(labelled[part], rows, strict=True), part.start + 1):
            label = numbers.get(record.label, -1) if isinstance(record.label, str) else record.label
            if label not in id2label:
                known = ", ".join(id2label.values())
                raise ValueError(f"record {number} has the label {record.label!r}, and the model's are {known}.")
            if long == "truncate" and len(row["input_ids"]) > cutoff_len:
                cut = {"truncation": True, "max_length": cutoff_len, "return_token_type_ids": typed}
                [row] = paired_rows([texts[number - 1 - part.start]], tokenizer, **cut)
                shortened += 1
            more = task_field(record, number, tasks)
            if typed:
                more["token_type_ids"] = np.asarray(row["token_type_ids"], np.int32)
            ids = np.asarray(row["input_ids"], np.int32)
            examples.append(Example(ids, np.asarray(label, np.int32), more))
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
