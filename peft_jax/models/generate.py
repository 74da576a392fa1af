"""Generation with a KV cache: prefill and decoding in one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.models.attention import KVCache


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults are greedy. Fields mean what they mean in transformers."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raise ValueError for a value out of range, or one that greedy decoding would ignore."""
        if not self.do_sample and self != Sampling():
            raise ValueError(f"{self} asks for sampling. Write do_sample=True, or leave the other fields out.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is above 0, got {self.temperature}. For greedy leave do_sample out.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is in (0, 1], got {self.top_p}.")


class _State(NamedTuple):
    step: jax.Array  # new tokens so far
    tokens: jax.Array  # (batch, prompt + new)
    logits: jax.Array  # (batch, vocabulary), of the last position
    done: jax.Array  # (batch,)
    cache: KVCache
    key: jax.Array


def generate(
    apply: Callable[..., Any],
    cache: KVCache,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
    pad_token_id: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008 - an immutable constant
) -> tuple[jax.Array, jax.Array]:
    """Continue left-padded prompts.

    Args:
        apply: ``apply(input_ids, attention_mask=, position_ids=, cache=)``, with ``.logits`` and ``.cache``.
        cache: Empty, for at least ``length + max_new_tokens`` positions.
        input_ids: (batch, length).
        attention_mask: (batch, length), 0 on the padding at the left.
        key: A JAX random key; greedy decoding ignores it.
        max_new_tokens: At most so many new tokens.
        eos_token_ids: A row is done after one of these; later positions hold ``pad_token_id``.
        pad_token_id: See ``eos_token_ids``.
        sampling: How tokens are chosen.

    Returns:
        Tokens (batch, length + max_new_tokens), and the number of steps taken until all rows were done.
    """
    batch, length = input_ids.shape
    mask = jnp.pad(attention_mask.astype(jnp.int32), ((0, 0), (0, max_new_tokens)))
    seen = jnp.sum(attention_mask, axis=1, dtype=jnp.int32)  # (batch,): the position that a new token has
    positions = jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)
    slots = jnp.arange(length + max_new_tokens)[None]
    first = apply(input_ids, attention_mask=mask, position_ids=positions, cache=cache)
    tokens = jnp.pad(input_ids, ((0, 0), (0, max_new_tokens)), constant_values=pad_token_id)
    done = jnp.zeros(batch, bool)
    state = _State(jnp.int32(0), tokens, first.logits[:, -1], done, first.cache, key)

    def proceed(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        key, draw = jax.random.split(state.key)
        chosen = jnp.where(state.done, pad_token_id, _choose(state.logits, draw, sampling)).astype(tokens.dtype)
        at = length + state.step
        new_tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], at, axis=1)
        stops = jnp.any(chosen[:, None] == jnp.array(eos_token_ids, chosen.dtype)[None], axis=1)
        live = (slots >= length) & (slots <= at)
        out = apply(
            chosen[:, None],
            attention_mask=jnp.where(live, 1, mask),
            position_ids=(seen + state.step)[:, None],
            cache=state.cache,
        )
        return _State(state.step + 1, new_tokens, out.logits[:, -1], state.done | stops, out.cache, key)

    state = jax.lax.while_loop(proceed, step, state)
    return state.tokens, state.step


def _choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids (batch,) from logits (batch, vocabulary)."""
    logits = logits.astype(jnp.float32)
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of all likelier tokens
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1)
