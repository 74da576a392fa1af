"""Keys and values that are kept: of earlier positions in a cache, and of a prompt before all positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree

Prefix = tuple[jax.Array, jax.Array]
Buffers = tuple[jax.Array, jax.Array]


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far.

    keys and values are (layers, batch, max_len, kv_heads, head_dim), the keys after rotation. The first `index` (a
    scalar int32) of the max_len slots are filled.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array  # type: ignore[assignment]  # a field, not the method of tuples

    @property
    def max_len(self) -> int:
        """The number of slots."""
        return self.keys.shape[2]

    @property
    def buffers(self) -> Buffers:
        """The keys and values that layers read and write."""
        return self.keys, self.values


class MixedCache(NamedTuple):
    """The memory that layers of several shapes keep of the positions seen so far.

    Attributes:
        buffers: By stack of layers, what its layers keep, with an axis of these layers in front: of an attention
            keys and values as in `KVCache`, a tuple; of other layers a dict.
        index: The number of slots that are filled, a scalar int32.
    """

    buffers: dict[str, Any]
    index: jax.Array  # type: ignore[assignment]

    @property
    def max_len(self) -> int:
        """The number of slots."""
        lengths = [kept[0].shape[2] for kept in self.buffers.values() if isinstance(kept, tuple)]
        return int(lengths[0])


class TwoCaches(NamedTuple):
    """The caches of two runs over the same positions, which are filled together.

    Attributes:
        first: That of a model's first pass (`peft_jax.models.handles.two_passes`), or of a small network beside it
            (`peft_jax.models.shadow_backbone`).
        second: That of the pass that gives the logits.
    """

    first: Any
    second: Any

    @property
    def index(self) -> jax.Array:  # type: ignore[override]  # of the cache, not the method of tuples
        """The number of slots that are filled."""
        index: jax.Array = self.second.index
        return index


def make_cache(layers: int, batch: int, max_len: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for max_len positions."""
    shape = (layers, batch, max_len, kv_heads, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def prefilled(cache: Any, prefix: Prefix) -> Any:
    """An empty cache with a prefix, (layers, batch or 1, n_virtual, kv_heads, head_dim), in its first slots."""
    buffers = []
    for buffer, part in zip((cache.keys, cache.values), prefix, strict=True):
        first = jnp.broadcast_to(part, (part.shape[0], buffer.shape[1], *part.shape[2:])).astype(buffer.dtype)
        buffers.append(jax.lax.dynamic_update_slice(buffer, first, (0,) * buffer.ndim))
    return cache._replace(keys=buffers[0], values=buffers[1], index=cache.index + prefix[0].shape[2])


def extend(
    buffers: Buffers | None, k: jax.Array, v: jax.Array, layer: jax.Array, index: jax.Array | int
) -> tuple[jax.Array, jax.Array, Buffers | None]:
    """Put a layer's new keys and values into the cache's buffers, and take out all that it holds for the layer."""
    if buffers is None:
        return k, v, None
    start = (layer, 0, index, 0, 0)
    written = (_write(buffers[0], k, start), _write(buffers[1], v, start))
    keys, values = (jax.lax.dynamic_index_in_dim(b, layer, keepdims=False).astype(k.dtype) for b in written)
    return keys, values, written


def _write(buffer: jax.Array, new: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, new[None].astype(buffer.dtype), start)


def filled(buffers: PyTree, index: jax.Array | int, length: int) -> KVCache | MixedCache | None:
    """The cache whose buffers took length new positions from index on."""
    if buffers is None:
        return None
    reached = jnp.asarray(index + length)
    if isinstance(buffers, dict):
        return MixedCache(buffers, reached)
    keys, values = buffers
    return KVCache(keys, values, reached)
