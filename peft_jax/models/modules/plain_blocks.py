"""Blocks of decoders beside Llama's kind: fused projections, feed-forward networks without a gate, parallel layers."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import ModelConfig
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.layers import linear_maker
from peft_jax.models.modules.remat import kept


class FusedAttention(SelfAttention):
    """Self-attention whose queries, keys and values are one projection.

    Its outputs are all queries, all keys, all values; or, if they are ``grouped``, for each head of keys and values the
    queries that belong to it, its key and its value. With as many queries as keys that is query, key and value of each
    head, and with a single key all queries before it.
    """

    fused_name: ClassVar[str] = "query_key_value"
    out_name: ClassVar[str] = "dense"
    grouped: ClassVar[bool] = True

    def add_projections(self, hidden: int, n_q: int, n_kv: int, linear: Any, bias: bool) -> None:
        """Make the projection to queries, keys and values."""
        self.n_q, self.n_kv = n_q, n_kv
        setattr(self, self.fused_name, linear(hidden, n_q + 2 * n_kv, use_bias=bias))

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        fused = kept(getattr(self, self.fused_name)(x))
        shape = (*x.shape[:2], -1, self.head_dim)
        if not self.grouped:
            q, k, v = jnp.split(fused, [self.n_q, self.n_q + self.n_kv], axis=-1)
            return q.reshape(shape), k.reshape(shape), v.reshape(shape)
        groups = fused.reshape(*x.shape[:2], self.n_kv // self.head_dim, -1, self.head_dim)
        return groups[..., :-2, :].reshape(shape), groups[..., -2, :], groups[..., -1, :]


class PlainMLP(nnx.Module):
    """Feed-forward network without a gate: second(act(first(x))).

    Args:
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        names: The names of both projections.
        inner: Features between them.
        act: transformers' name of the activation.
        bias: Whether they have a bias.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        names: tuple[str, str],
        inner: int,
        act: str,
        bias: bool = True,
    ) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.act, (self.first, self.second) = act, names
        setattr(self, self.first, linear(config.hidden_size, inner, use_bias=bias))
        setattr(self, self.second, linear(inner, config.hidden_size, use_bias=bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        inner = kept(getattr(self, self.first)(x))
        out: jax.Array = getattr(self, self.second)(ACTIVATIONS[self.act](inner))
        return out
