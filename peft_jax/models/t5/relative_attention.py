"""Attention as T5 computes it: no scale, a bias for each bucket of relative positions, self- and cross-caches."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.modules.attention import Dropping, dropping_of
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.positions import with_prefix
from peft_jax.models.t5.config import T5Config

KeysValues = tuple[jax.Array, jax.Array]


class T5Cache(NamedTuple):
    """Keys and values of a decoder: of its positions so far, and of the encoder's output.

    All four are (layers, batch, length, heads, head_dim). The self-attention's length is max_len slots, of which the
    first `index` (a scalar int32) are filled. `cross_mask` (batch or 1, length) is what may be seen of the encoder's,
    with a prefix of it in front.
    """

    keys: jax.Array
    values: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array
    cross_mask: jax.Array
    index: jax.Array  # type: ignore[assignment]  # a field, not the method of tuples


class Seen(NamedTuple):
    """Values that all self-attentions of one call share.

    bias is (1, heads, length, n_virtual + kv_len); mask, a bool (batch or 1, 1, length, n_virtual + kv_len), is what a
    query may see; slot is the first new position's in the cache.
    """

    bias: jax.Array
    mask: jax.Array
    slot: jax.Array | int = 0


@functools.lru_cache(maxsize=64)
def bucket_of_distance(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to max_distance, int32; what is further off is in the last one.

    The first half of the buckets holds one distance each, the others grow as powers.

    Example:
        >>> bucket_of_distance(8, 32)[[0, 3, 4, 7, 16, 32]].tolist()
        [0, 3, 4, 5, 6, 7]
    """
    exact = buckets // 2
    distances = np.arange(max_distance + 1)
    wide = np.log(np.maximum(distances, exact) / exact) / math.log(max_distance / exact) * (buckets - exact)
    grown = exact + np.floor(wide + 1e-6).astype(int)  # whole numbers stay whole
    return np.where(distances < exact, distances, np.minimum(grown, buckets - 1)).astype(np.int32)


def relative_buckets(config: T5Config, queries: jax.Array, keys: jax.Array, *, causal: bool) -> jax.Array:
    """Buckets (length, kv_len) of keys at positions (kv_len,) as seen from queries at positions (length,)."""
    relative = keys[None, :] - queries[:, None]
    buckets = config.relative_attention_num_buckets // (1 if causal else 2)
    table = jnp.asarray(bucket_of_distance(buckets, config.relative_attention_max_distance))
    distance = jnp.maximum(-relative, 0) if causal else jnp.abs(relative)
    found = jnp.take(table, jnp.minimum(distance, config.relative_attention_max_distance), axis=0)
    return found if causal else found + jnp.where(relative > 0, buckets, 0)


def attend(
    q: jax.Array, kv: KeysValues, bias: jax.Array | None, mask: jax.Array, dropping: Dropping | None = None
) -> jax.Array:
    """Attend from q (batch, length, heads, head_dim) to keys and values (batch, kv_len, heads, head_dim), unscaled.

    The softmax is in float32. A query that may see nothing sees everything equally, as in transformers.
    """
    keys, values = kv
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys, preferred_element_type=jnp.float32)
    scores = scores if bias is None else scores + bias.astype(jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    if dropping is not None:
        weights = dropped(weights, dropping.key, dropping.rate, Site.ATTENTION)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(values.dtype), values)


def behind(prefix: KeysValues | None, mask: jax.Array) -> jax.Array:
    """A mask (batch or 1, length) with ones in front for a prefix (layers, batch or 1, n_virtual, heads, head_dim)."""
    return with_prefix(mask[:, None], prefix)[:, 0]


class T5Attention(nnx.Module):
    """The four projections of an attention."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, wide = config.num_attention_heads * config.head_dim, config.hidden_size
        self.head_dim, self.rate = config.head_dim, config.rates.attention
        self.q = linear(config, wide, inner, (wide * config.head_dim) ** -0.5, dtype, rngs)
        self.k = linear(config, wide, inner, wide**-0.5, dtype, rngs)
        self.v = linear(config, wide, inner, wide**-0.5, dtype, rngs)
        self.o = linear(config, inner, wide, inner**-0.5, dtype, rngs)

    def keys_values(self, x: jax.Array) -> KeysValues:
        """Keys and values (batch, length, heads, head_dim) of x (batch, length, hidden)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        return self.k(x).reshape(heads), self.v(x).reshape(heads)

    def __call__(
        self, x: jax.Array, kv: KeysValues, bias: jax.Array | None, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Attend from x (batch, length, hidden)."""
        q = self.q(x).reshape(*x.shape[:2], -1, self.head_dim)
        seen = attend(q, kv, bias, mask, dropping_of(key, self.rate))
        return self.o(seen.reshape(*x.shape[:2], -1))


def linear(config: T5Config, n_in: int, n_out: int, deviation: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without a bias, as transformers initialises T5's."""
    init = nnx.initializers.normal(config.initializer_factor * deviation)
    return nnx.Linear(n_in, n_out, use_bias=False, kernel_init=init, param_dtype=dtype, rngs=rngs)
