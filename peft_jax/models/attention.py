"""Causal self-attention as transformers computes it: rotary positions, masks, grouped heads, a KV cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.models.llama_config import FULL, SLIDING, LlamaConfig


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far.

    keys and values are (layers, batch, max_len, kv_heads, head_dim), the keys after rotation. The first `index` (a
    scalar int32) of the max_len slots are filled.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array  # type: ignore[assignment]  # a field, not the method of tuples


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
    shape = (config.num_hidden_layers, batch, max_len, config.kv_heads, config.head_size)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


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
) -> Context:
    """Compute rotation and masks for embeddings x (batch, length, hidden).

    Positions default to slot numbers, as in transformers, whatever the attention mask. They turn queries and keys;
    what sees what depends on the slots, the mask and the segments. Several texts packed into one row are told apart by
    segment_ids (batch, length): a text sees itself alone, and its positions count from 0.

    Raises:
        ValueError: A shape does not fit the embeddings or the cache.
    """
    batch, length, _ = x.shape
    index: jax.Array | int = 0 if cache is None else cache.index
    kv_len = length if cache is None else cache.keys.shape[2]
    if kv_len < length:
        raise ValueError(f"The cache has room for {kv_len} positions, got {length} new ones. Make a longer cache.")
    slots = jnp.arange(length) + index
    if segment_ids is not None and (cache is not None or segment_ids.shape != (batch, length)):
        raise ValueError(f"segment_ids must be {(batch, length)}, without a cache, got {segment_ids.shape}.")
    if position_ids is None and segment_ids is not None:
        position_ids = segment_positions(segment_ids)
    positions = slots[None] if position_ids is None else position_ids
    if positions.shape not in ((1, length), (batch, length)):
        raise ValueError(f"position_ids must be {(batch, length)}, like the inputs, got {positions.shape}.")
    angles = positions.astype(jnp.float32)[:, :, None, None] * np.tile(inverse_frequencies(config), 2)[None, None, None]

    query, key = slots[None, :, None], jnp.arange(kv_len)[None, None, :]
    full = key <= query
    if attention_mask is not None:
        full &= _fit(attention_mask, batch, length, kv_len, cache is not None)[:, None, :]
    if segment_ids is not None:
        full &= segment_ids[:, :, None] == segment_ids[:, None, :]
    masks = {FULL: full}
    if config.sliding_window is not None:
        masks[SLIDING] = full & (key > query - config.sliding_window)
    return Context(jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype), masks, index)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions (batch, length) that count from 0 in each run of equal segment_ids (batch, length).

    Example:
        >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    slots = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)


def _fit(mask: jax.Array, batch: int, length: int, kv_len: int, cached: bool) -> jax.Array:
    """Widen a 0/1 mask (batch, n) to bool (batch, kv_len): slots of the cache that it does not reach are not seen."""
    if mask.ndim != 2 or mask.shape[0] != batch or not length <= mask.shape[1] <= kv_len:
        columns = f"{length} to {kv_len} (what the cache holds)" if cached else f"{length}, like the inputs"
        raise ValueError(f"attention_mask must have {batch} rows and {columns} columns, got shape {mask.shape}.")
    return jnp.pad(mask.astype(bool), ((0, 0), (0, kv_len - mask.shape[1])))


def rotate(x: jax.Array, context: Context) -> jax.Array:
    """Turn each half-split pair of features of x (batch, length, heads, head_dim) by its position's angle."""
    left, right = jnp.split(x, 2, axis=-1)
    return x * context.cos + jnp.concatenate([-right, left], axis=-1) * context.sin


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend from q (batch, length, heads, head_dim) to k and v (batch, kv_len, kv_heads, head_dim).

    The softmax is in float32. A query that may see nothing (mask all False, as on the left of a left-padded row) gets
    zeros, as from PyTorch's scaled_dot_product_attention.
    """
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, preferred_element_type=jnp.float32) * size**-0.5
    seen = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(seen, weights, 0).astype(v.dtype)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(q.shape)
