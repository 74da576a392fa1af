"""How the next token is chosen from logits: the processors and warpers of transformers, in its order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DRAWING = ("temperature", "top_k", "top_p", "min_p")  # what greedy decoding has no use for


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults are greedy. Fields mean what they mean in transformers."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raise ValueError for a value out of range, or one that greedy decoding would ignore."""
        asked = {name: getattr(self, name) for name in DRAWING if getattr(self, name) != getattr(Sampling(), name)}
        if asked and not self.do_sample:
            raise ValueError(f"{told(asked)} asks for sampling. Write do_sample=True, or leave the other fields out.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, got {self.temperature}. For greedy leave do_sample out.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, or 0 for all tokens, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is in (0, 1], got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is in [0, 1], got {self.min_p}.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is above 0, got {self.repetition_penalty}. 1 is no penalty.")


def process(logits: jax.Array, sampling: Sampling, tokens: jax.Array, counted: jax.Array) -> jax.Array:
    """Logits as transformers' processors and warpers leave them, float32; -inf where a token cannot be drawn.

    Tokens of equal logits at the edge of ``top_p`` all stay (in transformers their order in memory decides).

    Args:
        logits: (batch, vocabulary).
        sampling: What to do.
        tokens: Token ids so far (batch, length), for the repetition penalty.
        counted: Which of them count, bool (batch, length): not the padding.

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
        logits = jnp.where(repeated, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
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
    """Token ids (batch,) from logits (batch, vocabulary) that `process` has seen."""
    if sampling.do_sample:
        return jax.random.categorical(key, logits, axis=-1)
    return jnp.argmax(logits, axis=-1)


def told(fields: dict[str, Any]) -> str:
    """Fields as one writes them in a call."""
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())
