"""The gated delta rule: a memory of fixed size that each token decays, corrects and reads.

Yang et al., 2024 (https://arxiv.org/abs/2412.06464), as transformers' ``torch_chunk_gated_delta_rule`` and
``torch_recurrent_gated_delta_rule`` compute it, in float32. Of a token with query q, key k, value v, decay g and rate b
the state S (key features, value features) becomes ``S' = e^g S + k (b (v - k e^g S))``, and its output is ``q S'``.

Many tokens go in chunks: the corrections within a chunk solve a triangular system, so that a chunk costs a few products
of matrices, and only the states between chunks are computed one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens
EPSILON = 1e-6  # of transformers' l2norm


class Tokens(NamedTuple):
    """Inputs of the rule in float32, heads before tokens.

    Attributes:
        q: Queries ``(batch, heads, length, key features)``, normalised and scaled.
        k: Keys, like the queries, normalised.
        v: Values ``(batch, heads, length, value features)``.
        decay: The logarithm of what the state is multiplied by, ``(batch, heads, length)``, at most 0.
        rate: How much of a correction is made, ``(batch, heads, length)``.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    decay: jax.Array
    rate: jax.Array


class Chunk(NamedTuple):
    """A chunk of tokens, as far as it does not depend on the state before it; all with an axis of chunks in front.

    Attributes:
        values: Values that it would write to an empty state ``(chunks, batch, heads, size, value features)``.
        keys: What is subtracted from them, times the state ``(chunks, batch, heads, size, key features)``.
        reads: Queries of the state, like `keys`.
        scores: Queries of what the chunk itself has written ``(chunks, batch, heads, size, size)``.
        writes: Keys by which values are written into the state after it, like `keys`.
        decay: What the state is multiplied by ``(chunks, batch, heads, 1, 1)``.
    """

    values: jax.Array
    keys: jax.Array
    reads: jax.Array
    scores: jax.Array
    writes: jax.Array
    decay: jax.Array


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    state: jax.Array,
    text: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Read tokens into a state; each gets what the state then holds for its query.

    Args:
        q: Queries (batch, length, key heads, key features), of any length; each head serves the same number of
            consecutive heads of values.
        k: Keys, like the queries.
        v: Values (batch, length, heads, value features).
        decay: The logarithm of the decay (batch, length, heads), at most 0.
        rate: The rate of corrections (batch, length, heads).
        state: The state before the first token, float32 (batch, heads, key features, value features).
        text: Numbers of texts (batch, length), which do not fall; a text starts from an empty state, but for text 0,
            which goes on from `state`.

    Returns:
        The outputs (batch, length, heads, value features) in the dtype of v, and the state after the last token.

    Example:
        >>> key, value = jnp.ones((1, 2, 1, 4)), jnp.array([3.0, 5.0]).reshape(1, 2, 1, 1)
        >>> rate, state = jnp.ones((1, 2, 1)), jnp.zeros((1, 1, 4, 1))
        >>> out, _ = delta_rule(key, key, value, 0 * rate, rate, state)
        >>> [round(float(one), 3) for one in out.ravel()]  # of equal keys the second value stands
        [1.5, 2.5]
    """
    tokens = _in_float32(q, k, v, decay, rate)
    if v.shape[1] == 1 and text is None:
        out, state = _one(tokens, state)
    else:
        out, state = _in_chunks(tokens, state, text)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype), state


def _in_float32(q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, rate: jax.Array) -> Tokens:
    group = v.shape[2] // q.shape[2]
    q, k = jnp.repeat(q, group, axis=2), jnp.repeat(k, group, axis=2)
    q, k, v, decay, rate = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k, v, decay, rate))
    return Tokens(_normalized(q) * q.shape[-1] ** -0.5, _normalized(k), v, decay, rate)


def _normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of matrices in full float32, which accelerators round by default: errors of a state add up."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _one(tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read one token."""
    state = state * jnp.exp(tokens.decay)[..., None]
    correction = tokens.rate[..., None] * (tokens.v - _product(tokens.k, state))
    state = state + jnp.swapaxes(tokens.k, 2, 3) * correction
    return _product(tokens.q, state), state


def _in_chunks(tokens: Tokens, state: jax.Array, text: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Read many tokens."""
    batch, heads, length, _ = tokens.v.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())
    rest = -length % size  # empty tokens at the end change nothing
    tokens = Tokens(*(_split(x, rest, size) for x in tokens))
    if text is not None:
        text = jnp.pad(text, ((0, 0), (0, rest)), mode="edge").reshape(batch, 1, -1, size)
    chunks = Chunk(*(jnp.moveaxis(x, 2, 0) for x in _prepared(tokens, text)))

    def read(state: jax.Array, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
        written = chunk.values - _product(chunk.keys, state)
        out = _product(chunk.reads, state) + _product(chunk.scores, written)
        return state * chunk.decay + _product(jnp.swapaxes(chunk.writes, 2, 3), written), out

    state, out = jax.lax.scan(read, state, chunks)
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, length + rest, -1)[:, :, :length], state


def _split(x: jax.Array, rest: int, size: int) -> jax.Array:
    """Tokens (batch, heads, length, ...) in chunks (batch, heads, chunks, size, ...), with empty ones at the end."""
    widths = ((0, 0), (0, 0), (0, rest), *((0, 0),) * (x.ndim - 3))
    padded = jnp.pad(x, widths)
    return padded.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _prepared(tokens: Tokens, text: jax.Array | None) -> Chunk:
    """All that does not depend on the state, for all chunks at once, with the axis of chunks after that of heads.

    Args:
        tokens: Tokens in chunks.
        text: Their texts (batch, 1, chunks, size).
    """
    total = jnp.cumsum(tokens.decay, axis=-1)  # from the start of the chunk
    last = total[..., -1:]
    size = total.shape[-1]
    may_see = jnp.tril(jnp.ones((1, 1, 1, size, size), bool))
    to_start, to_end, through = jnp.exp(total), jnp.exp(last - total), jnp.exp(last)
    if text is not None:
        before = jnp.pad(text[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))  # the text that the state is of
        may_see = may_see & (text[..., :, None] == text[..., None, :])
        to_start = jnp.where(text == before, to_start, 0)
        to_end = jnp.where(text == text[..., -1:], to_end, 0)
        through = jnp.where(text[..., -1:] == before, through, 0)
    between = jnp.exp(jnp.where(may_see, total[..., :, None] - total[..., None, :], -jnp.inf))
    rate = tokens.rate[..., None]
    backwards = jnp.swapaxes(tokens.k, 3, 4)
    solved = inverse_of_unit_lower(_product(rate * tokens.k, backwards) * between)
    return Chunk(
        values=_product(solved, rate * tokens.v),
        keys=_product(solved, rate * tokens.k * to_start[..., None]),
        reads=tokens.q * to_start[..., None],
        scores=_product(tokens.q, backwards) * between,
        writes=tokens.k * to_end[..., None],
        decay=through[..., None],
    )


def inverse_of_unit_lower(lower: jax.Array) -> jax.Array:
    """The inverse of I + L, where L is what a matrix has below its diagonal.

    It is made of the inverses of the two halves on the diagonal, by products alone, which a mesh can split.

    Args:
        lower: The matrices (..., n, n), where n is a power of two; what is not below the diagonal is not looked at.

    Example:
        >>> inverse_of_unit_lower(jnp.array([[9.0, 9.0], [0.5, 9.0]])).tolist()
        [[1.0, 0.0], [-0.5, 1.0]]
    """
    size = lower.shape[-1]
    if size == 1:
        return jnp.ones_like(lower)
    half = size // 2
    first, second = inverse_of_unit_lower(jnp.stack([lower[..., :half, :half], lower[..., half:, half:]]))
    corner = -_product(second, _product(lower[..., half:, :half], first))
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    below = jnp.concatenate([corner, second], axis=-1)
    return jnp.concatenate([above, below], axis=-2)
