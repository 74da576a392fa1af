"""Causal self-attention as transformers computes it: rotary positions, masks, grouped heads, a KV cache."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.chunks import chunk_size, in_chunks, out_of_chunks
from peft_jax.models.llama.config import FULL, SLIDING, LlamaConfig
from peft_jax.models.modules.positions import (
    KVCache,
    Prefix,
    causal_places,
    make_cache,
)
from peft_jax.models.modules.remat import kept
from peft_jax.prompts.base import Adaption

__all__ = ["Context", "KVCache", "attend", "attend_to", "init_cache", "inverse_frequencies", "make_context", "rotate"]

SCORES = 2**24  # that are there at once on each device
UNSEEN = float(np.finfo(np.float32).min) / 2  # what is added to a score that counts for nothing
BLOCKS, LEAST = 4, 64  # blocks that the queries of a causal attention go in at most, and queries in each at least


class Context(NamedTuple):
    """What all layers of one call share.

    cos and sin are (batch or 1, length, 1, head_dim); masks maps each kind of layer to what a query may see, a bool
    (batch or 1, length, kv_len); index is the slot of the cache that the first new position takes.
    """

    cos: jax.Array
    sin: jax.Array
    masks: dict[str, jax.Array]
    index: jax.Array | int  # type: ignore[assignment]


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """Make an empty cache for max_len positions.

    Example:
        >>> init_cache(LlamaConfig(num_hidden_layers=2), batch=3, max_len=5).keys.shape
        (2, 3, 5, 32, 128)
    """
    return make_cache(config.num_hidden_layers, batch, max_len, config.kv_heads, config.head_size, dtype)


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Compute the rotary frequencies, (head_dim // 2,) in float32, as transformers' modeling_rope_utils does."""
    rope = config.rope_scaling
    exponents = np.arange(0, config.head_size, 2).astype(np.float32) / np.float32(config.head_size)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    if rope.rope_type == "default":
        return frequencies
    slow = frequencies / np.float32(rope.factor)
    if rope.rope_type == "linear":
        return slow
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelength  # within the context of pretraining
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return ((1 - smooth) * slow + smooth * frequencies).astype(np.float32)


def make_context(
    config: LlamaConfig,
    x: jax.Array,
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    cache: KVCache | None,
    segment_ids: jax.Array | None = None,
    prefix: Prefix | None = None,
) -> Context:
    """Compute rotation and masks for embeddings x (batch, length, hidden).

    Positions default to slot numbers, as in transformers, whatever the attention mask. They turn queries and keys;
    what sees what depends on the slots, the mask and the segments. Several texts packed into one row are told apart by
    segment_ids (batch, length): a text sees itself alone, and its positions count from 0. A prefix takes the first
    slots, and is seen by all.

    Raises:
        ValueError: A shape does not fit the embeddings or the cache.
    """
    places = causal_places(
        *x.shape[:2],
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cache=cache,
        prefix=prefix,
    )
    positions = places.positions.astype(jnp.float32)[:, :, None, None]
    angles = positions * np.tile(inverse_frequencies(config), 2)[None, None, None]
    masks = {FULL: places.mask}
    if config.sliding_window is not None:
        virtual = 0 if prefix is None else prefix[0].shape[2]
        query = (jnp.arange(x.shape[1]) + places.index + virtual)[None, :, None]
        key = jnp.arange(places.mask.shape[2])[None, None, :]
        masks[SLIDING] = places.mask & (key > query - config.sliding_window)
    return Context(jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype), masks, places.index)


def rotate(x: jax.Array, context: Context) -> jax.Array:
    """Turn each half-split pair of features of x (batch, length, heads, head_dim) by its position's angle."""
    left, right = jnp.split(x, 2, axis=-1)
    return x * context.cos + jnp.concatenate([-right, left], axis=-1) * context.sin


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, causal: bool = False) -> jax.Array:
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
    """
    size = chunk_size((*q.shape[:3], k.shape[1]), SCORES)
    if size == q.shape[1]:
        return _in_blocks(q, k, v, mask, min(BLOCKS, max(1, size // LEAST)) if causal else 1)
    turn = jax.checkpoint(lambda part: _in_blocks(part[0], k, v, part[1], 1), prevent_cse=False)
    return out_of_chunks(jax.lax.map(turn, (in_chunks(q, size), in_chunks(mask, size))), q.shape[1])


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    """As `attend`; of several blocks of queries each leaves out the keys behind it."""
    batch, length, _, size = q.shape
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    grouped = q.reshape(batch, length, k.shape[1], -1, size).transpose(0, 2, 3, 1, 4)  # the heads of each kv head
    edges = [length * i // count for i in range(count + 1)]
    blocks = []
    for start, stop in itertools.pairwise(edges):
        rows, seen = grouped[:, :, :, start:stop], k.shape[2] - length + stop
        blocks.append(_attend(rows, k[:, :, :seen], v[:, :, :seen], mask[:, start:stop, :seen]))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend from q (batch, kv_heads, group, length, head_dim) to k and v (batch, kv_heads, kv_len, head_dim)."""
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.einsum("bkqd,bksd->bkqs", rows, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    # Added, as a choice between two would be made again in the backward pass; a maximum above it makes exp give 0.
    scores = scores + jnp.tile(jnp.where(mask, 0, UNSEEN)[:, None], (1, 1, q.shape[2], 1))
    top = kept(jnp.maximum(jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True), UNSEEN / 2))
    weights = jnp.exp(scores - top)
    total = kept(weights.sum(axis=-1, keepdims=True))
    # Divided by their sum after the product with v: fewer divisions, and no sum over scores in the backward pass.
    out = jnp.einsum("bkqs,bksd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _quotient(out, jnp.where(total == 0, 1, total), v.dtype).reshape(q.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _quotient(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Divide a by b; the derivative takes the quotient, so that backward need not make a again, which is a product."""
    return (a / b).astype(dtype)


@_quotient.defjvp
def _quotient_jvp(dtype: Any, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> Any:
    (a, b), (da, db) = primals, tangents
    quotient = kept((a / b).astype(dtype))
    return quotient, ((da - quotient.astype(a.dtype) * db) / b).astype(dtype)


def attend_to(adaption: Adaption, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """What q (batch, length, heads, head_dim) sees of a layer's adaption prompt, through its gate.

    k and v (1, n, kv_heads, head_dim) are those of the prompt, which is seen whole from everywhere.
    """
    k, v = (jnp.broadcast_to(part.astype(q.dtype), (q.shape[0], *part.shape[1:])) for part in (k, v))
    seen = attend(q, k, v, jnp.ones((1, q.shape[1], k.shape[1]), bool))
    return seen * adaption.gates[0].astype(q.dtype)
