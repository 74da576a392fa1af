"""Attention as transformers computes it: masks, grouped heads, a softmax in float32."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peft_jax.core.chunks import chunk_size, in_chunks, out_of_chunks
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.logits_form import softcapped
from peft_jax.models.modules.remat import kept
from peft_jax.prompts.base import Adaption

SCORES = 2**24  # that are there at once on each device
UNSEEN = float(np.finfo(np.float32).min) / 2  # what is added to a score that counts for nothing
BLOCKS, LEAST = 4, 64  # blocks that the queries of a causal attention go in at most, and queries in each at least


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the scores of an attention are made of products of queries and keys.

    Attributes:
        scale: What products are multiplied by; None for one over the root of a head's features.
        softcap: The cap that scores are bent towards; None for none.
        finite: Whether a query that may see nothing gets the mean of all values, as from transformers' "eager"
            attention, in which all scores are finite; otherwise zeros. `attend` leaves it to its caller.
    """

    scale: float | None = None
    softcap: float | None = None
    finite: bool = False


PLAIN_SCORES = Scoring()


class Dropping(NamedTuple):
    """How weights of an attention are dropped: by a key, with a probability."""

    key: jax.Array
    rate: float


def dropping_of(key: jax.Array | None, rate: float) -> Dropping | None:
    """How a layer with this key drops weights of its attention; None if it drops none.

    Example:
        >>> dropping_of(None, 0.1) is None
        True
    """
    return None if key is None or not rate else Dropping(key, rate)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    causal: bool = False,
    scoring: Scoring = PLAIN_SCORES,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
    dropping: Dropping | None = None,
) -> jax.Array:
    """Attend from q (batch, length, heads, head_dim) to k and v (batch, kv_len, kv_heads, head_dim).

    The softmax is in float32. A query that may see nothing (mask all False, as on the left of a left-padded row) gets
    zeros, as from PyTorch's scaled_dot_product_attention. Where there are many scores, queries take turns, and the
    backward pass computes each turn's scores again.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: What a query may see, bool (batch or 1, length, kv_len).
        causal: The mask lets no query see beyond its own place, where the last query stands at the last key. Then
            queries go in blocks, each of which leaves out the keys behind it.
        scoring: How scores are made.
        sinks: A score of each head (heads,) that takes its part in the softmax and has no value.
        bias: What is added to the scores, (batch or 1, heads, length or 1, kv_len).
        dropping: How weights are dropped after the softmax; None for not at all.
    """
    size = chunk_size((*q.shape[:3], k.shape[1]), SCORES)
    if size == q.shape[1]:
        count = min(BLOCKS, max(1, size // LEAST)) if causal else 1
        return _in_blocks(q, k, v, mask, count, scoring, sinks, bias, dropping)
    parts = {"q": in_chunks(q, size), "mask": in_chunks(mask, size)}
    if dropping is not None:
        parts["key"] = jax.random.split(dropping.key, parts["q"].shape[0])
    if bias is not None and bias.shape[2] > 1:
        parts["bias"] = in_chunks(jnp.swapaxes(bias, 1, 2), size)

    def attend_part(part: dict[str, jax.Array]) -> jax.Array:
        own = jnp.swapaxes(part["bias"], 1, 2) if "bias" in part else bias
        turn_dropping = None if dropping is None else dropping._replace(key=part["key"])
        return _in_blocks(part["q"], k, v, part["mask"], 1, scoring, sinks, own, turn_dropping)

    turn = jax.checkpoint(attend_part, prevent_cse=False)
    return out_of_chunks(jax.lax.map(turn, parts), q.shape[1])


def _in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    count: int,
    scoring: Scoring,
    sinks: jax.Array | None,
    bias: jax.Array | None,
    dropping: Dropping | None,
) -> jax.Array:
    """As `attend`; of several blocks of queries each leaves out the keys behind it."""
    batch, length, heads, size = q.shape
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    grouped = q.reshape(batch, length, k.shape[1], -1, size).transpose(0, 2, 3, 1, 4)  # the heads of each kv head
    edges = [length * i // count for i in range(count + 1)]
    blocks = []
    for start, stop in itertools.pairwise(edges):
        rows, seen = grouped[:, :, :, start:stop], k.shape[2] - length + stop
        added = None if bias is None else _rows_of_bias(bias, k.shape[1], start, stop)[..., :seen]
        top = None if sinks is None else _rows_of_sinks(sinks, k.shape[1], stop - start)
        block_mask = mask[:, start:stop, :seen]
        drops = None if dropping is None else dropping._replace(key=jax.random.fold_in(dropping.key, start))
        blocks.append(_attend(rows, k[:, :, :seen], v[:, :, :seen], block_mask, scoring, top, added, drops))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


def _rows_of_bias(bias: jax.Array, kv_heads: int, start: int, stop: int) -> jax.Array:
    """Part of a bias (batch or 1, heads, length or 1, kv_len) as (batch or 1, kv_heads, group * length, kv_len)."""
    batch, _, length, seen = bias.shape
    part = bias if length == 1 else bias[:, :, start:stop]
    grouped = part.reshape(batch, kv_heads, -1, part.shape[2], seen)
    rows = jnp.broadcast_to(grouped, (*grouped.shape[:3], stop - start, seen))
    return rows.reshape(batch, kv_heads, -1, seen)


def _rows_of_sinks(sinks: jax.Array, kv_heads: int, length: int) -> jax.Array:
    """Scores of heads (heads,) as (1, kv_heads, group * length, 1), float32."""
    grouped = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
    return jnp.broadcast_to(grouped, (*grouped.shape[:3], length)).reshape(1, kv_heads, -1, 1)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scoring: Scoring,
    sinks: jax.Array | None,
    bias: jax.Array | None,
    dropping: Dropping | None,
) -> jax.Array:
    """Attend from q (batch, kv_heads, group, length, head_dim) to k and v (batch, kv_heads, kv_len, head_dim)."""
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = jnp.einsum("bkqd,bksd->bkqs", rows, k, preferred_element_type=jnp.float32) * scale
    if scoring.softcap is not None:
        scores = softcapped(scores, scoring.softcap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    # Added, as a choice between two would be made again in the backward pass; a maximum above it makes exp give 0.
    scores = scores + jnp.tile(jnp.where(mask, 0, UNSEEN)[:, None], (1, 1, q.shape[2], 1))
    highest = jnp.maximum(jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True), UNSEEN / 2)
    if sinks is not None:
        highest = jnp.maximum(highest, jax.lax.stop_gradient(sinks))
    top = kept(highest)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    total = kept(total)
    if dropping is not None:  # the sum is that of all weights, as they are dropped after the softmax
        weights = dropped(weights, dropping.key, dropping.rate, Site.ATTENTION)
    # Divided by their sum after the product with v: fewer divisions, and no sum over scores in the backward pass.
    out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _quotient(out, jnp.where(total == 0, 1, total), v.dtype).reshape(*q.shape[:-1], v.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _quotient(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Divide a by b; the derivative takes the quotient, so that backward need not make a again, which is a product."""
    return (a / b).astype(dtype)


@_quotient.defjvp
def _quotient_jvp(dtype: DTypeLike, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    (a, b), (da, db) = primals, tangents
    quotient = kept((a / b).astype(dtype))
    return quotient, ((da - quotient.astype(a.dtype) * db) / b).astype(dtype)


def attend_to(adaption: Adaption, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of q (batch, length, heads, head_dim) to a layer's adaption prompt, through its gate.

    k and v (1, n, kv_heads, head_dim) are those of the prompt, which is seen whole from everywhere.
    """
    k, v = (jnp.broadcast_to(part.astype(q.dtype), (q.shape[0], *part.shape[1:])) for part in (k, v))
    seen = attend(q, k, v, jnp.ones((1, q.shape[1], k.shape[1]), bool))
    return seen * adaption.gates[0].astype(q.dtype)
