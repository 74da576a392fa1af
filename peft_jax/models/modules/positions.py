"""Where the inputs of a causal model stand, and what each of them may see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Prefix
from peft_jax.models.modules.shadow_state import ShadowLayers
from peft_jax.prompts.base import Adaption


class Beside(NamedTuple):
    """A prompt's part in the attention: of one layer, or with a leading axis of layers of all of them.

    prefix is keys (after rotation) and values, each (batch or 1, n_virtual, kv_heads, head_dim), before those of the
    inputs; adaption is a prompt that the layer attends to as well. shadow is what a shadow's state does to the layer.
    """

    prefix: Prefix | None = None
    adaption: Adaption | None = None
    shadow: ShadowLayers | None = None


class Places(NamedTuple):
    """Positions and masks that the layers of one call of a causal model share.

    Attributes:
        positions: ``(batch or 1, length)``.
        mask: What a query may see, bool ``(batch or 1, length, n_virtual + kv_len)``.
        index: The slot of the cache that the first new position takes.
    """

    positions: jax.Array
    mask: jax.Array
    index: jax.Array | int  # type: ignore[assignment]  # a field, not the method of tuples


def causal_places(batch: int, length: int, inputs: ForwardInputs) -> Places:
    """Positions and mask of a causal model's inputs.

    Positions default to slot numbers, as in transformers, whatever the attention mask; those of a prefix come first.
    Several texts packed into one row are told apart by segment_ids (batch, length): a text sees itself alone, and its
    positions count from 0. A prefix is seen by all.

    Args:
        batch: Rows of the inputs.
        length: New positions.
        inputs: The masks and positions that are given, and keys and values of earlier positions.

    Raises:
        ValueError: A shape does not fit.

    Example:
        >>> places = causal_places(1, 3, ForwardInputs(attention_mask=jnp.array([[0, 1, 1]])))
        >>> places.mask[0].astype(int).tolist()
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    cache, segment_ids, position_ids = inputs.cache, inputs.segment_ids, inputs.position_ids
    index: jax.Array | int = 0 if cache is None else cache.index
    kv_len = length if cache is None else cache.max_len
    if kv_len < length:
        raise ValueError(f"The cache has room for {kv_len} positions, got {length} new ones. Make a longer cache.")
    if segment_ids is not None and (cache is not None or segment_ids.shape != (batch, length)):
        raise ValueError(f"segment_ids must be {(batch, length)}, without a cache, got {segment_ids.shape}.")
    slots = jnp.arange(length) + index
    mask = jnp.arange(kv_len)[None, None, :] <= slots[None, :, None]
    if inputs.attention_mask is not None:
        mask &= seen_slots(inputs.attention_mask, batch, length, kv_len, cache is not None)[:, None, :]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if position_ids is None:
        counted = slots[None] if segment_ids is None else segment_positions(segment_ids)
        position_ids = inputs.virtual + counted
    check_positions(position_ids, batch, length)
    return Places(position_ids, with_prefix(mask, inputs.prefix), index)


def check_room(places: Places, inputs: ForwardInputs, rows: int) -> None:
    """Raise ValueError unless a table of positions has enough rows for inputs without positions of their own."""
    needed = places.mask.shape[2]
    if inputs.position_ids is None and needed > rows:
        raise ValueError(f"{needed} positions are needed, but this model has {rows}. Shorten the inputs.")


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Positions (batch, length) that count from 0 in each run of equal segment_ids (batch, length).

    Example:
        >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
        [[0, 1, 2, 0, 1, 0]]
    """
    slots = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)


def check_positions(position_ids: jax.Array, batch: int, length: int) -> None:
    """Raise ValueError unless there is one position for each input."""
    if position_ids.shape not in ((1, length), (batch, length)):
        raise ValueError(f"position_ids must be {(batch, length)}, like the inputs, got {position_ids.shape}.")


def with_prefix(mask: jax.Array, prefix: Prefix | None) -> jax.Array:
    """A mask (batch or 1, length, kv_len) with the positions of a prefix in front of kv_len, seen by all."""
    if prefix is None:
        return mask
    return jnp.pad(mask, ((0, 0), (0, 0), (prefix[0].shape[2], 0)), constant_values=True)


def put_before(prefix: Prefix | None, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values (batch, kv_len, kv_heads, head_dim) with those of the prefix in front of them."""
    if prefix is None:
        return keys, values
    shape = (keys.shape[0], *prefix[0].shape[1:])
    first = (jnp.broadcast_to(array, shape).astype(keys.dtype) for array in prefix)
    k, v = (jnp.concatenate(pair, axis=1) for pair in zip(first, (keys, values), strict=True))
    return k, v


def seen_slots(mask: jax.Array, batch: int, length: int, kv_len: int, cached: bool) -> jax.Array:
    """Widen a 0/1 mask (batch, n) to bool (batch, kv_len): slots of the cache that it does not reach are not seen."""
    if mask.ndim != 2 or mask.shape[0] != batch or not length <= mask.shape[1] <= kv_len:
        columns = f"{length} to {kv_len} (what the cache holds)" if cached else f"{length}, like the inputs"
        raise ValueError(f"attention_mask must have {batch} rows and {columns} columns, got shape {mask.shape}.")
    return jnp.pad(mask.astype(bool), ((0, 0), (0, kv_len - mask.shape[1])))
