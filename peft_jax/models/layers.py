"""The small layers that the Llama family is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.models.llama_config import LlamaConfig


class Embed(nnx.Module):
    """A table (vocab, hidden), looked up by id."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Look up ids (batch, length)."""
        return jnp.take(self.embedding[...], ids, axis=0)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, rounded to the dtype of x, times a scale."""

    def __init__(self, features: int, eps: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * jnp.reshape(self.scale[...], (1,) * (x.ndim - 1) + (-1,))


def linear_maker(config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    """Return `make(in_features, out_features, use_bias=...)` of linear layers initialised as the config says."""
    init = nnx.initializers.normal(config.initializer_range)
    return functools.partial(nnx.Linear, kernel_init=init, param_dtype=dtype, rngs=rngs)
