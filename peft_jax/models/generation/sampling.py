"""How the next token is chosen from logits: the processors and warpers of transformers, in its order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults are greedy. Fields mean what they mean in `GenerateOptions`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0


def process(logits: jax.Array, sampling: Sampling, tokens: jax.Array, counted: jax.Array) -> jax.Array:
    """Logits as transformers' processors and warpers leave them, float32; -inf where a token cannot be drawn.

    Tokens of equal logits at the edge of ``top_p`` all stay (in transformers their order in memory decides).

    Args:
        logits: (batch, vocabulary).
        sampling: How the token is to be chosen.
        tokens: Token ids so far (batch, length), for the repetition penalty.
        counted: False on the padding, bool (batch, length).

    Returns:
        (batch, vocabulary).

    Example:
        >>> none = jnp.zeros((1, 0), int)
        >>> process(jnp.array([[0.0, 2.0, 1.0]]), Sampling(True, temperature=0.5, top_k=2), none, none).tolist()
        [[-inf, 4.0, 2.0]]
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        rows = jnp.arange(len(tokens))[:, None]
        repeated = jnp.zeros(logits.shape, bool).at[rows, tokens].max(counted.astype(bool))
        penalty = sampling.repetition_penalty
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(repeated, penalized, logits)
    if not sampling.do_sample:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)
        reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)  # from the least likely upwards
        kept = (reached > 1 - sampling.top_p).at[:, -1].set(True)
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        least = sampling.min_p * jnp.max(probabilities, axis=-1, keepdims=True)
        logits = jnp.where(probabilities < least, -jnp.inf, logits)
    return logits


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Token ids (batch,) from logits (batch, vocabulary) that `process` returned."""
    if sampling.do_sample:
        return jax.random.categorical(key, logits, axis=-1)
    return jnp.argmax(logits, axis=-1)
