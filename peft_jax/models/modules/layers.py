"""The small layers that the architectures are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.ids import rows_at
from peft_jax.models.config import ModelConfig


class Embed(nnx.Module):
    """A table (count, width), looked up by id; by default of the vocabulary's count and the hidden width.

    Lookups do not train the row of padding in the table of the vocabulary, nor ``untrained_row`` in another one.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        count: int | None = None,
        width: int | None = None,
        untrained_row: int | None = None,
    ) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        rows = config.vocab_size if count is None else count
        shape = (rows, config.hidden_size if width is None else width)
        self.embedding = nnx.Param(init(rngs.params(), shape, dtype))
        self.untrained_row = config.untrained_row if count is None else untrained_row

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Look up ids (batch, length); one out of range gives NaN."""
        return rows_at(self.embedding[...], ids, self.untrained_row)

    def either(self, ids: jax.Array | None, embeddings: jax.Array | None, scale: float = 1) -> jax.Array:
        """The embeddings (batch, length, hidden) of ids (batch, length), times scale, or those given in their place.

        Raises:
            ValueError: None or both are given.
        """
        if embeddings is None and ids is not None:
            return scaled(self(ids), scale)
        if embeddings is not None and ids is None:
            return embeddings.astype(self.embedding.dtype)
        found = "neither" if ids is None else "both"
        raise ValueError(f"A call needs input_ids or inputs_embeds, one of them, got {found}.")


def scaled(embeddings: jax.Array, scale: float) -> jax.Array:
    """Embeddings times a number, which is rounded to their element type first, as transformers rounds it."""
    if scale == 1:
        return embeddings
    return embeddings * jnp.float32(scale).astype(embeddings.dtype)


def multiplied(x: jax.Array, factor: float) -> jax.Array:
    """Numbers times a number in float32, rounded to their element type once, as PyTorch rounds it."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def normalized(x: jax.Array, eps: float) -> jax.Array:
    """X / rms(x) along the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, rounded to the dtype of x, times a scale."""

    def __init__(self, features: int, eps: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x."""
        wide = normalized(x, self.eps)
        return wide.astype(x.dtype) * jnp.reshape(self.scale[...], (1,) * (x.ndim - 1) + (-1,))


class WideRMSNorm(nnx.Module):
    """x / rms(x) times a scale, all in float32, and rounded to the dtype of x afterwards.

    Args:
        features: Length of the last axis.
        eps: Added to the mean square.
        dtype: Element type of the scale.
        offset: Added to the scale, which starts at 1 minus it.
    """

    def __init__(self, features: int, eps: float, dtype: DTypeLike, *, offset: float = 0) -> None:
        self.scale = nnx.Param(jnp.full((features,), 1 - offset, dtype))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x."""
        wide = normalized(x, self.eps)
        scale = jnp.reshape(self.scale[...], (1,) * (x.ndim - 1) + (-1,)).astype(jnp.float32)
        if self.offset:
            scale = scale + self.offset
        return (wide * scale).astype(x.dtype)


class Unchanged(nnx.Module):
    """A layer in the place of another that some configs leave out."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give x back."""
        return x


class LayerNorm(nnx.Module):
    """(x - mean) / deviation in float32, times a scale, plus a bias.

    Args:
        features: Length of the last axis, or lengths of the last axes; the last alone is normalised.
        eps: Added to the variance.
        dtype: Element type of the parameters.
        bias: Whether there is a bias.
        affine: Whether there is a scale, without which there is no bias either.
    """

    def __init__(
        self, features: int | tuple[int, ...], eps: float, dtype: DTypeLike, *, bias: bool = True, affine: bool = True
    ) -> None:
        shape = (features,) if isinstance(features, int) else features
        self.eps, self.affine, self.use_bias = eps, affine, affine and bias
        if self.affine:
            self.scale = nnx.Param(jnp.ones(shape, dtype))
        if self.use_bias:
            self.bias = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            wide = wide * self._spread(self.scale, x.ndim)
        return (wide + self._spread(self.bias, x.ndim) if self.use_bias else wide).astype(x.dtype)

    def _spread(self, parameter: nnx.Param[Any], ndim: int) -> jax.Array:
        """A parameter as float32 with axes in front, as many as x has."""
        value = parameter[...]
        shape = (1,) * (ndim - value.ndim) + tuple(value.shape)
        return jnp.reshape(value, shape).astype(jnp.float32)


def linear_maker(config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    """Return `make(in_features, out_features, use_bias=...)` of linear layers initialised as the config says."""
    init = nnx.initializers.normal(config.initializer_range)
    return functools.partial(nnx.Linear, kernel_init=init, param_dtype=dtype, rngs=rngs)
