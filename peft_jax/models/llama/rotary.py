"""Rotary positions, plain or stretched, and what each kind of layer may see."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.models.llama.config import FULL, SLIDING, LlamaConfig
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.positions import causal_places


class Context(NamedTuple):
    """Rotation and masks, which all layers of one call share.

    cos and sin are (batch or 1, length, 1, head_dim); masks maps each kind of layer to what a query may see, a bool
    (batch or 1, length, kv_len); index is the slot of the cache that the first new position takes.
    """

    cos: jax.Array
    sin: jax.Array
    masks: dict[str, jax.Array]
    index: jax.Array | int  # type: ignore[assignment]


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


def make_context(config: LlamaConfig, x: jax.Array, inputs: ForwardInputs) -> Context:
    """Compute rotation and masks for embeddings x (batch, length, hidden).

    Positions turn queries and keys; what sees what depends on the slots, the mask and the segments
    (`peft_jax.models.modules.positions.causal_places`).

    Raises:
        ValueError: A shape does not fit the embeddings or the cache.
    """
    batch, length, _ = x.shape
    places = causal_places(batch, length, inputs)
    positions = places.positions.astype(jnp.float32)[:, :, None, None]
    angles = positions * np.tile(inverse_frequencies(config), 2)[None, None, None]
    masks = {FULL: places.mask}
    if config.sliding_window is not None:
        query = (jnp.arange(length) + places.index + inputs.virtual)[None, :, None]
        key = jnp.arange(places.mask.shape[2])[None, None, :]
        masks[SLIDING] = places.mask & (key > query - config.sliding_window)
    return Context(jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype), masks, places.index)


def rotate(x: jax.Array, context: Context) -> jax.Array:
    """Turn each half-split pair of features of x (batch, length, heads, head_dim) by its position's angle."""
    left, right = jnp.split(x, 2, axis=-1)
    return x * context.cos + jnp.concatenate([-right, left], axis=-1) * context.sin
