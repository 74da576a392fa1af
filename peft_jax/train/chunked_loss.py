"""Cross entropy over a vocabulary in chunks of positions, so that all logits are never there at once.

Their gradients are taken chunk by chunk as soon as a chunk's logits are there (Hsu et al., 2024, "Liger Kernel",
https://arxiv.org/abs/2410.10989, fused linear cross entropy), so that the head's product is not computed again in the
backward pass. Kept for that are the gradient of the head's inputs, and of what of the head is trained.
"""

from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.adapters.input_ids import reads_input_ids
from peft_jax.core.chunks import chunk_size, in_chunks
from peft_jax.core.dropout import has_dropout
from peft_jax.models.modules.lazy_logits import LazyLogits

CHUNK = 2**25  # logits of a chunk on each device


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of each target in nats, float32; NaN of one that is no class.

    The target's logit is summed out of its row rather than looked up: the gradient of a lookup is a row of zeros with
    one number added, which XLA writes out for every target, whereas this one is a part of the softmax's.
    """
    wide = logits.astype(jnp.float32)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    chosen = classes == targets[..., None]
    losses = jax.nn.logsumexp(wide, axis=-1) - jnp.sum(jnp.where(chosen, wide, 0), axis=-1)
    return jnp.where((targets >= 0) & (targets < logits.shape[-1]), losses, jnp.nan)


def weighted_sum(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of losses times their weights, of which 0 leaves one out, even if it is NaN."""
    return jnp.sum(losses * weights, where=weights != 0)


def summed_loss(logits: LazyLogits, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """The `weighted_sum` of `token_losses`, float32.

    A head whose adapter depends on a token's position (dropout, or token ids) sees all positions at once.

    Args:
        logits: Of shape (batch, length, vocabulary).
        targets: Token ids (batch, length).
        weights: What each loss is multiplied by (batch, length), float32; a constant to the gradient.
    """
    size = chunk_size(logits.shape, CHUNK)
    if size == logits.shape[1] or has_dropout(logits.weight) or reads_input_ids(logits.weight):
        return weighted_sum(token_losses(logits.compute(), targets), weights)
    parts = tuple(in_chunks(array, size) for array in (logits.hidden, targets, weights))
    return _sum_over_chunks(logits, parts)


def _sum_over_chunks(logits: LazyLogits, parts: tuple[jax.Array, ...]) -> jax.Array:
    leaves, structure = jax.tree.flatten((logits.weight, logits.bias))

    def loss(leaves: list[Any], hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        weight, bias = jax.tree.unflatten(structure, leaves)
        chunk = LazyLogits(hidden, weight, logits.tied, bias, logits.form)
        return weighted_sum(token_losses(chunk.compute(), targets), weights)

    @jax.custom_vjp
    def total(leaves: list[Any], hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        def add(found: jax.Array, part: Any) -> Any:
            return found + loss(leaves, *part), None

        return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]

    def forward(leaves: list[Any], hidden: Any, targets: Any, weights: Any) -> Any:
        values = [leaf.value for leaf in leaves]
        moved = [place for place, leaf in enumerate(leaves) if leaf.perturbed]  # frozen ones get no gradient

        def add(sums: Any, part: Any) -> Any:
            def of(trained: dict[int, Any], hidden: jax.Array) -> jax.Array:
                return loss([trained.get(place, value) for place, value in enumerate(values)], hidden, *part[1:])

            found, pull = jax.vjp(of, {place: values[place] for place in moved}, part[0])
            of_weight, of_hidden = pull(jnp.float32(1))
            return jax.tree.map(lambda s, one: s + one.astype(s.dtype), sums, (found, of_weight)), of_hidden

        zeros = {place: jnp.zeros(values[place].shape, jnp.float32) for place in moved}
        parts = hidden.value, targets.value, weights.value
        (found, of_weight), of_hidden = jax.lax.scan(add, (jnp.float32(0), zeros), parts)
        return found, ([of_weight.get(place) for place in range(len(values))], of_hidden)

    def backward(gradients: Any, factor: jax.Array) -> Any:
        of_weight, of_hidden = gradients
        scaled = []
        for gradient, leaf in zip(of_weight, leaves, strict=True):
            scaled.append(None if gradient is None else (gradient * factor).astype(leaf.dtype))
        return scaled, (of_hidden.astype(factor.dtype) * factor).astype(of_hidden.dtype), None, None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves, *parts)
