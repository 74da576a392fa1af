"""Problems that models with heads are trained for: the loss of their labels, and the scores of an evaluation."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from peft_jax.core.pytree import PyTree
from peft_jax.train.answers_found import span_scores
from peft_jax.train.batch_loss import Apply, SummedLoss, logits_of
from peft_jax.train.data.batches import Batch
from peft_jax.train.data.long_examples import IGNORE, Window
from peft_jax.train.data.records import Question
from peft_jax.train.entities import tag_scores
from peft_jax.train.losses import binary_cross_entropy, cross_entropy, squared_error
from peft_jax.train.scores import Guesses, correlations, several_classes

GuessingStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The loss of labels, and the measures of a model on them.

    Attributes:
        loss: Of logits and a batch, the loss summed over the labels and the number of these.
        guess: Of logits and a batch, what the model says of each row, (batch, ...).
        scores: The scores of all rows' guesses, by name.
        unit: What the loss is of, in words.
    """

    loss: SummedLoss
    guess: Callable[[jax.Array, Batch], jax.Array]
    scores: Callable[[Guesses], Mapping[str, float]]
    unit: str


def make_guessing_step(apply: Apply, problem: Problem) -> GuessingStep:
    """Build the compiled step ``(params, batch) -> (summed loss, number of labels, guesses)``, without dropout.

    Args:
        apply: As `peft_jax.train.make_training_step` takes it.
        problem: The problem.
    """

    def step(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = logits_of(apply, params, batch)
        loss, count = problem.loss(logits, batch)
        return loss, count, problem.guess(logits, batch)

    return jax.jit(step)


def score_guesses(step: GuessingStep, problem: Problem, params: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss over the labels of the batches, and the scores; ``step`` is from `make_guessing_step`."""
    losses, counts = [], []
    found: list[dict[str, np.ndarray]] = []
    for batch in batches:
        loss, count, guesses = step(params, batch)
        losses.append(float(loss))
        counts.append(int(count))
        fields: dict[str, Any] = {**batch, "guesses": guesses}
        found.append({name: _whole(array) for name, array in fields.items()})
    return {"loss": sum(losses) / sum(counts), **problem.scores(found)}


def _whole(array: Any) -> np.ndarray:
    """An array with the rows of all processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _numbers(logits: jax.Array, batch: Batch) -> jax.Array:
    return logits.astype(jnp.float32)


REGRESSION_PROBLEM = Problem(
    loss=lambda logits, batch: squared_error(logits, jnp.asarray(batch["labels"])),
    guess=_numbers,
    scores=correlations,
    unit="squared error a number",
)
MULTI_LABEL_PROBLEM = Problem(
    loss=lambda logits, batch: binary_cross_entropy(logits, jnp.asarray(batch["labels"])),
    guess=_numbers,
    scores=several_classes,
    unit="nats a class of a text",
)


def tag_problem(id2label: Mapping[int, str]) -> Problem:
    """The classes of tokens; virtual tokens of a prompt, whose logits stand in front, have none.

    Args:
        id2label: Names of the classes by number.
    """
    return Problem(_loss_of_tags, _guessed_tags, partial(tag_scores, id2label), "nats a word")


def _loss_of_tags(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(_of_tokens(logits, batch), jnp.asarray(batch["labels"]), next_token=False)


def _guessed_tags(logits: jax.Array, batch: Batch) -> jax.Array:
    return jnp.argmax(_of_tokens(logits, batch), axis=-1).astype(jnp.int32)


def _of_tokens(logits: jax.Array, batch: Batch) -> jax.Array:
    """The logits of the batch's own tokens."""
    return logits[:, -batch["input_ids"].shape[1] :]


def span_problem(records: Sequence[Question], windows: Sequence[Window]) -> Problem:
    """The ends of answers. The loss of a row does not depend on its padding, and is transformers' of the row alone.

    Args:
        records: The questions.
        windows: The part of its text that each row has.
    """
    return Problem(_loss_of_spans, _guessed_spans, partial(span_scores, records, windows), "nats an end")


def _loss_of_spans(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    virtual = logits.shape[1] - batch["input_ids"].shape[1]
    mask = jnp.pad(jnp.asarray(batch["attention_mask"]), ((0, 0), (virtual, 0)), constant_values=1)
    losses, count = [], jnp.int32(0)
    for name, one in (("labels", logits[..., 0]), ("ends", logits[..., 1])):
        places = jnp.asarray(dict(batch)[name])
        places = jnp.where(places == IGNORE, IGNORE, places + virtual)
        total, count = cross_entropy(jnp.where(mask > 0, one, LOWEST), places, next_token=False)
        losses.append(total)
    return (losses[0] + losses[1]) / 2, count


def _guessed_spans(logits: jax.Array, batch: Batch) -> jax.Array:
    return _of_tokens(logits, batch).astype(jnp.float32)


LOWEST = -1e4  # in place of the logits of padding
