"""Cross entropy of tokens or classes, as sums that add up over batches."""

import jax
import jax.numpy as jnp

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
