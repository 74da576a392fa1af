"""The losses that transformers' heads compute from labels, in float32; labels of -100 are ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core.ids import is_outside

IGNORED_LABEL = -100
REGRESSION, SINGLE, MULTI = "regression", "single_label_classification", "multi_label_classification"
PROBLEMS = (REGRESSION, SINGLE, MULTI)


@jax.jit
def mean_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean cross entropy over the labels; NaN if one of them is not a class.

    Args:
        logits: ``(..., n)``.
        labels: Classes ``(...)``.
        weights: Factor of each label's loss ``(...)``; by default 1.
    """
    counted = labels != IGNORED_LABEL
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counted, labels, 0)
    )
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    losses = jnp.where(is_class, losses, jnp.nan)
    if weights is not None:
        losses = losses * weights
    return jnp.sum(losses, where=counted) / jnp.sum(counted, dtype=jnp.float32)


def shifted_mean_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean cross entropy of the logits ``(batch, length, n)`` at each position with the label at the next."""
    if weights is not None:
        weights = weights[:, 1:]
    return mean_cross_entropy(logits[:, :-1], labels[:, 1:], weights)


def sequence_loss(logits: jax.Array, labels: jax.Array, problem: str | None) -> jax.Array:
    """The loss of a classifier or regressor of texts.

    Args:
        logits: ``(batch, n)``.
        labels: Classes ``(batch,)``; numbers, one for each logit; or for several labels of one text 0/1 ``(batch, n)``.
        problem: The kind of labels: "single_label_classification", "regression" or "multi_label_classification". None
            decides as transformers does: regression for n of 1, else by whether labels are integers.

    Raises:
        ValueError: The labels' shape does not fit.
    """
    count = logits.shape[-1]
    if problem is None and count == 1:
        problem = REGRESSION
    elif problem is None:
        problem = SINGLE if jnp.issubdtype(labels.dtype, jnp.integer) else MULTI
    if problem == SINGLE:
        return mean_cross_entropy(logits, _reshaped(labels, logits.shape[:1], problem))
    wide = logits.astype(jnp.float32)
    labels = _reshaped(labels, logits.shape, problem).astype(jnp.float32)
    if problem == REGRESSION:
        return jnp.mean((wide - labels) ** 2)
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(wide, labels))


def span_loss(start_logits: jax.Array, end_logits: jax.Array, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """The loss of logits ``(batch, length)`` of a span's ends at ``(batch,)``; ends outside are ignored."""

    def loss(logits: jax.Array, positions: jax.Array) -> jax.Array:
        length = logits.shape[1]
        inside = jnp.clip(jnp.reshape(positions, (-1,)), 0, length)
        return mean_cross_entropy(logits, jnp.where(inside == length, IGNORED_LABEL, inside))

    return (loss(start_logits, starts) + loss(end_logits, ends)) / 2


def class_labels(labels: jax.Array | np.ndarray, count: int) -> jax.Array:
    """Labels as an array, checked where they have values; under `jax.jit` one out of range gives a loss of NaN.

    Raises:
        ValueError: if a class is neither one of ``count`` nor -100.
    """
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if np.issubdtype(labels.dtype, np.integer) and (bounds := is_outside(labels, count, IGNORED_LABEL)):
        raise ValueError(
            f"labels are from {bounds[0]} to {bounds[1]}, but this model has classes 0 to {count - 1}. "
            f"Load it with num_labels={bounds[1] + 1}, or write -100 where there is no label."
        )
    return jnp.asarray(labels)


def token_labels(labels: jax.Array | np.ndarray, vocabulary: int) -> jax.Array:
    """Labels of a language model as an array, checked where they have values; under `jax.jit` the loss is NaN.

    Raises:
        ValueError: if a label is neither an id of the vocabulary nor -100.
    """
    if bounds := is_outside(labels, vocabulary, IGNORED_LABEL):
        raise ValueError(
            f"labels are from {bounds[0]} to {bounds[1]}, but the vocabulary has ids 0 to {vocabulary - 1}. "
            "Use the tokenizer of this model, and -100 where there is no label."
        )
    return jnp.asarray(labels)


def _reshaped(labels: jax.Array, shape: tuple[int, ...], problem: str) -> jax.Array:
    if labels.size != np.prod(shape):
        raise ValueError(f"labels for {problem} must be {shape}, got {labels.shape}.")
    return jnp.reshape(labels, shape)
