"""The attention and the feed-forward network that most decoders share, with transformers' common names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.modules.attention import PLAIN_SCORES, Scoring, attend, attend_to, dropping_of
from peft_jax.models.modules.base_dropout import NO_DROPOUT, DropoutRates, Site, dropped
from peft_jax.models.modules.kv_cache import Buffers, extend
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import linear_maker, multiplied
from peft_jax.models.modules.positions import put_before
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary import rotate
from peft_jax.prompts.base import Adaption


def attend_within(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    call: LayerCall,
    buffers: Buffers | None,
    *,
    scoring: Scoring = PLAIN_SCORES,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
    rate: float = 0.0,
) -> tuple[jax.Array, Buffers | None]:
    """Attend from q to new keys and values, to a prefix before them and to those in the cache, which takes the new.

    Args:
        q: Queries (batch, length, heads, head_dim), turned.
        k: Keys (batch, length, kv_heads, head_dim), turned.
        v: Values, like the keys.
        call: What the layer gets.
        buffers: The cache's keys and values.
        scoring: As in `attend`, like those after it.
        sinks: Scores of heads.
        bias: What is added to the scores.
        rate: The probability with which weights are dropped in training.
    """
    k, v, buffers = extend(buffers, k, v, call.place, call.index)
    k, v = put_before(call.beside.prefix, k, v)
    mask = call.view.mask
    dropping = dropping_of(call.key, rate)
    seen = attend(q, k, v, mask, causal=buffers is None, scoring=scoring, sinks=sinks, bias=bias, dropping=dropping)
    if scoring.finite:
        mean = mean_value(v, k.shape[1] if buffers is None else call.index + q.shape[1], q.shape[2])
        seen = jnp.where(mask.any(axis=-1)[..., None, None], seen, mean)
    return seen, buffers


def mean_value(v: jax.Array, count: jax.Array | int, heads: int) -> jax.Array:
    """The mean (batch, 1, heads, head_dim) of the first ``count`` of the values (batch, kv_len, kv_heads, head_dim)."""
    counted = (jnp.arange(v.shape[1]) < count)[None, :, None, None]
    total = jnp.where(counted, v.astype(jnp.float32), 0).sum(axis=1, keepdims=True)
    mean = total / jnp.asarray(count, jnp.float32)
    return jnp.repeat(mean, heads // v.shape[2], axis=2).astype(v.dtype)


class SelfAttention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    A subclass may change `heads` (fused projections, norms of queries and keys), `sink_scores`, and the name of its
    last projection.

    Args:
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has one.
        scoring: How scores are made.
        interleaved: How pairs of features are turned, as in `rotate`.
        head_dim: Features of a head; None for the config's.
        kv_heads: Heads of keys and values; None for the config's.
    """

    out_name: ClassVar[str] = "o_proj"

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        out_bias: bool = False,
        scoring: Scoring = PLAIN_SCORES,
        interleaved: bool = False,
        head_dim: int | None = None,
        kv_heads: int | None = None,
    ) -> None:
        self.head_dim = config.head_size if head_dim is None else head_dim
        self.scoring, self.interleaved, self.rate = scoring, interleaved, config.rates.attention
        n_q = config.num_attention_heads * self.head_dim
        n_kv = (config.kv_heads if kv_heads is None else kv_heads) * self.head_dim
        self.add_projections(config.hidden_size, n_q, n_kv, linear_maker(config, dtype, rngs), bias)
        setattr(self, self.out_name, linear_maker(config, dtype, rngs)(n_q, config.hidden_size, use_bias=out_bias))

    def add_projections(self, hidden: int, n_q: int, n_kv: int, linear: Any, bias: bool) -> None:
        """Make the projections to queries, keys and values."""
        self.q_proj = linear(hidden, n_q, use_bias=bias)
        self.k_proj = linear(hidden, n_kv, use_bias=bias)
        self.v_proj = linear(hidden, n_kv, use_bias=bias)

    @property
    def out(self) -> nnx.Linear:
        """The projection of all heads."""
        last: nnx.Linear = getattr(self, self.out_name)
        return last

    @property
    def sink_scores(self) -> jax.Array | None:
        """A score of each head (heads,) that takes its part in the softmax and has no value; None for none."""
        return None

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (kept(project(x)).reshape(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def __call__(self, x: jax.Array, call: LayerCall, buffers: PyTree) -> tuple[jax.Array, Any]:
        """Attend within x (batch, length, hidden), to this layer's prompt and its part of the cache's buffers."""
        batch, length, _ = x.shape
        q, k, v = self.heads(x)
        turn = call.view.turn
        q, k = rotate(q, turn, interleaved=self.interleaved), rotate(k, turn, interleaved=self.interleaved)
        if call.view.query_factor is not None:
            q = q * call.view.query_factor.astype(q.dtype)
        bias, sinks = call.view.bias, self.sink_scores
        seen, buffers = attend_within(
            q, k, v, call, buffers, scoring=self.scoring, sinks=sinks, bias=bias, rate=self.rate
        )
        adaption = call.beside.adaption
        if adaption is None:
            return self.out(seen.reshape(batch, length, -1)), buffers
        seen = seen + self._attend_to(adaption, q)
        return self.out(seen.reshape(batch, length, -1)) + self._second_bias(adaption, x), buffers

    def _attend_to(self, adaption: Adaption, q: jax.Array) -> jax.Array:
        """Attention of q (batch, length, heads, head_dim) to an adaption prompt, through its gate."""
        prompt = adaption.prompts.astype(q.dtype)[None]
        heads = (1, prompt.shape[1], -1, self.head_dim)
        return attend_to(adaption, q, self.k_proj(prompt).reshape(heads), self.v_proj(prompt).reshape(heads))

    def _second_bias(self, adaption: Adaption, x: jax.Array) -> jax.Array:
        """PEFT projects what is seen of an adaption prompt by itself, so that a bias is added once more."""
        if not self.out.use_bias:
            return jnp.zeros((), x.dtype)
        bias: jax.Array = self.out(jnp.zeros((1, 1, self.out.in_features), x.dtype))
        return jnp.where(adaption.on, bias, 0)


class GatedMLP(nnx.Module):
    """Gated feed-forward network: down(act(gate(x)) * up(x)).

    Args:
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        inner: Features between the projections.
        act: transformers' name of the activation.
        bias: Whether the projections have a bias.
    """

    def __init__(
        self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs, *, inner: int, act: str, bias: bool = False
    ) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.act = act
        self.gate_proj = linear(config.hidden_size, inner, use_bias=bias)
        self.up_proj = linear(config.hidden_size, inner, use_bias=bias)
        self.down_proj = linear(inner, config.hidden_size, use_bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        gate, up = kept(self.gate_proj(x)), kept(self.up_proj(x))
        return self.down_proj(ACTIVATIONS[self.act](gate) * up)


class PreNormLayer(nnx.Module):
    """Attention and feed-forward network, each normalised before and added to the residual stream.

    Args:
        attention: The attention.
        mlp: The feed-forward network.
        make_norm: What makes a norm.
        factor: What both outputs are multiplied by.
        rates: What is dropped in training.
    """

    def __init__(
        self,
        attention: nnx.Module,
        mlp: nnx.Module,
        make_norm: Callable[[], nnx.Module],
        *,
        factor: float = 1,
        rates: DropoutRates = NO_DROPOUT,
    ) -> None:
        self.self_attn, self.mlp, self.factor, self.rates = attention, mlp, factor, rates
        self.input_layernorm, self.post_attention_layernorm = make_norm(), make_norm()

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.self_attn(self.input_layernorm(x), call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        x = kept(x + multiplied(out.astype(x.dtype), self.factor))
        out = dropped(self.mlp(self.post_attention_layernorm(x)), call.key, self.rates.mlp_out, Site.MLP_OUT)
        return x + multiplied(out.astype(x.dtype), self.factor), buffers


class ParallelLayer(nnx.Module):
    """Attention and feed-forward network side by side: both take one norm's output and are added to the stream.

    Args:
        attention: The attention.
        mlp: The feed-forward network.
        norm: The norm.
        rates: What is dropped in training.
    """

    def __init__(
        self, attention: nnx.Module, mlp: nnx.Module, norm: nnx.Module, *, rates: DropoutRates = NO_DROPOUT
    ) -> None:
        self.self_attn, self.mlp, self.input_layernorm, self.rates = attention, mlp, norm, rates

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        normal = self.input_layernorm(x)
        out, buffers = self.self_attn(normal, call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        added = dropped(self.mlp(normal), call.key, self.rates.mlp_out, Site.MLP_OUT)
        return kept(x + out.astype(x.dtype)) + added.astype(x.dtype), buffers
