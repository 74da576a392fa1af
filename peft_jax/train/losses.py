"""Losses of tokens, classes and numbers, as sums that add up over batches."""

import jax
import jax.numpy as jnp
import optax

from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.train.chunked_loss import summed_loss, token_losses, weighted_sum
from peft_jax.train.data.encode import IGNORE


def cross_entropy(
    logits: jax.Array | LazyLogits, labels: jax.Array, weights: jax.Array | None = None, *, next_token: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of each next token, summed in float32 over the tokens that have a label.

    The logits at one position predict the label at the next, as in `transformers`. Sum and count come apart so that
    they can be added up over batches before one is divided by the other.

    Args:
        logits: (batch, length, vocabulary), any float type; or what they are to be computed from, which is done in
            chunks, so that memory does not hold them all.
        labels: (batch, length), token ids and `IGNORE` (-100) where nothing is asked; any other number gives NaN.
        weights: (batch, length), what each label's loss is multiplied by; by default 1.
        next_token: False where logits predict the label at their own place, as those of classifiers of texts, whose
            logits are (batch, classes) and labels (batch,), or of tokens, and of encoder-decoders.

    Returns:
        The sum in nats, float32, and the number of target tokens, int32.

    Example:
        >>> total, count = cross_entropy(jnp.zeros((1, 3, 4)), jnp.array([[-100, 2, 3]]))
        >>> int(count), round(float(total / count), 4)  # log(4)
        (2, 1.3863)
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE) if next_token else labels
    asked = targets != IGNORE
    targets, count = jnp.where(asked, targets, 0), jnp.sum(asked, dtype=jnp.int32)
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    elif next_token:
        weights = jnp.pad(weights[:, 1:], ((0, 0), (0, 1)))
    weights = jnp.where(asked, weights, 0)
    if isinstance(logits, LazyLogits):
        return summed_loss(logits, targets, weights), count
    return weighted_sum(token_losses(logits, targets), weights), count


def squared_error(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared error of each number, summed in float32 over the labels, and their number.

    Their quotient is the loss that transformers computes for the ``problem_type`` regression.

    Args:
        logits: (batch, outputs), any float type.
        labels: (batch, outputs), float; NaN where nothing is asked.

    Example:
        >>> total, count = squared_error(jnp.array([[1.0], [0.0]]), jnp.array([[3.0], [jnp.nan]]))
        >>> float(total), int(count)
        (4.0, 1)
    """
    wide, known, asked = _asked_numbers(logits, labels)
    return jnp.sum((wide - known) ** 2, where=asked), jnp.sum(asked, dtype=jnp.int32)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of each class of its own, summed in float32 nats over the labels, and their number.

    Their quotient is the loss that transformers computes for the ``problem_type`` multi_label_classification.

    Args:
        logits: (batch, classes), any float type.
        labels: (batch, classes), 1.0 for a class of the text and 0.0 for another; NaN where nothing is asked.

    Example:
        >>> total, count = binary_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
        >>> int(count), round(float(total / count), 4)  # log(2)
        (2, 0.6931)
    """
    wide, known, asked = _asked_numbers(logits, labels)
    losses = optax.losses.sigmoid_binary_cross_entropy(wide, known)
    return jnp.sum(losses, where=asked), jnp.sum(asked, dtype=jnp.int32)


def _asked_numbers(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits and labels in float32, and where there are labels; others are 0 so that no gradient is NaN."""
    asked = ~jnp.isnan(labels)
    return logits.astype(jnp.float32), jnp.where(asked, labels, 0).astype(jnp.float32), asked
