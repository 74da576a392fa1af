"""The layers that a block of T5 is made of, each normalised before and added to the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.modules.base_dropout import Site, dropped, key_of
from peft_jax.models.modules.kv_cache import extend
from peft_jax.models.modules.positions import put_before
from peft_jax.models.t5.config import T5Config
from peft_jax.models.t5.relative_attention import (
    KeysValues,
    Seen,
    T5Attention,
    linear,
)


class T5LayerNorm(nnx.Module):
    """x / rms(x) in float32, rounded to the dtype of the scale, times the scale."""

    def __init__(self, config: T5Config, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.full((config.hidden_size,), config.initializer_factor, dtype))
        self.eps = config.layer_norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x."""
        wide, scale = x.astype(jnp.float32), self.scale[...]
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(scale.dtype) * jnp.reshape(scale, (1,) * (x.ndim - 1) + (-1,))


class T5LayerSelfAttention(nnx.Module):
    """Attention of a stack's positions to each other, added to the residual stream."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.SelfAttention, self.rate = T5Attention(config, dtype, rngs), config.rates.attention_out
        self.layer_norm = T5LayerNorm(config, dtype)

    def __call__(
        self,
        x: jax.Array,
        seen: Seen,
        layer: jax.Array,
        buffers: KeysValues | None,
        prefix: KeysValues | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Attend within x (batch, length, hidden), to a prefix, and to this layer's part of the cache's buffers."""
        normed = self.layer_norm(x)
        k, v, buffers = extend(buffers, *self.SelfAttention.keys_values(normed), layer, seen.slot)
        kv = put_before(prefix, k, v)
        out = self.SelfAttention(normed, kv, seen.bias, seen.mask, key)
        return _add(x, dropped(out, key, self.rate, Site.ATTENTION_OUT)), buffers


class T5LayerCrossAttention(nnx.Module):
    """Attention of the decoder's positions to the encoder's output, added to the residual stream."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.EncDecAttention, self.rate = T5Attention(config, dtype, rngs), config.rates.attention_out
        self.layer_norm = T5LayerNorm(config, dtype)

    def keys_values(self, encoded: jax.Array, prefix: KeysValues | None) -> KeysValues:
        """Keys and values (batch, kv_len, heads, head_dim) of the encoder's output (batch, length, hidden)."""
        return put_before(prefix, *self.EncDecAttention.keys_values(encoded.astype(self.layer_norm.scale[...].dtype)))

    def __call__(self, x: jax.Array, kv: KeysValues, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """Attend from x (batch, length, hidden)."""
        crossing = key_of(key, Site.CROSS_ATTENTION)
        out = self.EncDecAttention(self.layer_norm(x), kv, None, mask, crossing)
        return _add(x, dropped(out, crossing, self.rate, Site.ATTENTION_OUT))


class T5Dense(nnx.Module):
    """Feed-forward network: wo(act(wi(x))), or gated wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        n_in, inner = config.hidden_size, config.intermediate_size
        self.is_gated, self.rate = config.is_gated, config.rates.inner
        if config.is_gated:
            self.wi_0 = linear(config, n_in, inner, n_in**-0.5, dtype, rngs)
            self.wi_1 = linear(config, n_in, inner, n_in**-0.5, dtype, rngs)
        else:
            self.wi = linear(config, n_in, inner, n_in**-0.5, dtype, rngs)
        self.wo = linear(config, inner, n_in, inner**-0.5, dtype, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map x (batch, length, hidden)."""
        act = ACTIVATIONS[self.activation]
        h = act(self.wi_0(x)) * self.wi_1(x) if self.is_gated else act(self.wi(x))
        h = dropped(h, key, self.rate, Site.INNER)
        return self.wo(h.astype(self.wo.kernel[...].dtype))


class T5LayerFF(nnx.Module):
    """Feed-forward network, added to the residual stream."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.DenseReluDense, self.rate = T5Dense(config, dtype, rngs), config.rates.mlp_out
        self.layer_norm = T5LayerNorm(config, dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map x (batch, length, hidden)."""
        out = self.DenseReluDense(self.layer_norm(x), key)
        return _add(x, dropped(out, key, self.rate, Site.MLP_OUT))


def _add(x: jax.Array, out: jax.Array) -> jax.Array:
    """The residual stream and what a layer adds to it, kept finite in float16 as transformers does."""
    x = x + out.astype(x.dtype)
    if x.dtype != jnp.float16:
        return x
    largest = jnp.finfo(x.dtype).max
    limit = jnp.where(jnp.any(jnp.isinf(x)), largest - 1000, largest).astype(x.dtype)
    return jnp.clip(x, -limit, limit)
