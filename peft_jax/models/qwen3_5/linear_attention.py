"""The gated delta net of Qwen3.5: projections, a short convolution, the gated delta rule, a gated norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.modules.causal_conv import causal_conv
from peft_jax.models.modules.delta_rule import delta_rule
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import linear_maker, normalized
from peft_jax.models.modules.remat import kept
from peft_jax.models.qwen3_5.config import Qwen35Config

Memory = dict[str, jax.Array]


class GatedNorm(nnx.Module):
    """x / rms(x) times a scale, times silu of a gate in float32."""

    def __init__(self, features: int, eps: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Normalise the last axis of x (batch, length, heads, features); the gate has its shape."""
        scaled = jnp.reshape(self.scale[...], (1, 1, 1, -1)) * normalized(x, self.eps).astype(x.dtype)
        return (scaled.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class ChannelKernel(nnx.Module):
    """The kernel of a convolution of each channel by itself, in PyTorch's order (channels, 1, taps)."""

    def __init__(self, config: Qwen35Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        shape = (config.conv_channels, 1, config.linear_conv_kernel_dim)
        self.weight = nnx.Param(init(rngs.params(), shape, dtype))


class GatedDeltaNet(nnx.Module):
    """Linear attention: what a text has said so far is a matrix a head, whatever its length."""

    declared = ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def __init__(self, config: Qwen35Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        hidden, values, heads = config.hidden_size, config.linear_values, config.linear_num_value_heads
        self.config = config
        self.in_proj_qkv = linear(hidden, config.conv_channels, use_bias=False)
        self.in_proj_z = linear(hidden, values, use_bias=False)
        self.in_proj_b = linear(hidden, heads, use_bias=False)
        self.in_proj_a = linear(hidden, heads, use_bias=False)
        self.conv1d = ChannelKernel(config, dtype, rngs)
        self.dt_bias = nnx.Param(jnp.ones((heads,), dtype))
        rates = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 0.01, 16)
        self.A_log = nnx.Param(jnp.log(rates).astype(dtype))
        self.norm = GatedNorm(config.linear_value_head_dim, config.rms_norm_eps, dtype)
        self.out_proj = linear(values, hidden, use_bias=False)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Memory | None) -> tuple[jax.Array, Memory | None]:
        """Map x (batch, length, hidden), with this layer's part of the memories in the cache's buffers."""
        steps, config = call.view.steps, self.config
        if steps.real is not None:
            x = x * steps.real[..., None].astype(x.dtype)
        batch, length, _ = x.shape
        conv, state = self._memory(batch, call, buffers, x.dtype)
        mixed, conv = causal_conv(kept(self.in_proj_qkv(x)), self.conv1d.weight[...], conv, steps.text)
        keys = config.linear_keys
        q, k, v = jnp.split(ACTIVATIONS[config.hidden_act](mixed), (keys, 2 * keys), axis=-1)
        q, k = (part.reshape(batch, length, -1, config.linear_key_head_dim) for part in (q, k))
        v = v.reshape(batch, length, -1, config.linear_value_head_dim)
        seen, state = delta_rule(q, k, v, self._decay(x), jax.nn.sigmoid(self.in_proj_b(x)), state, steps.text)
        gate = kept(self.in_proj_z(x)).reshape(seen.shape)
        out = self.out_proj(self.norm(kept(seen), gate).reshape(batch, length, -1))
        return out, _with_memory(buffers, call.place, conv, state)

    def _decay(self, x: jax.Array) -> jax.Array:
        """The logarithm of each head's decay, float32 (batch, length, heads)."""
        bias = self.dt_bias[...].astype(jnp.float32)[None, None]
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))[None, None]
        return -rate * jax.nn.softplus(self.in_proj_a(x).astype(jnp.float32) + bias)

    def _memory(
        self, batch: int, call: LayerCall, buffers: Memory | None, dtype: DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens that the convolution still sees, and the state; empty without a cache."""
        if buffers is None:
            empty = make_memory(self.config, 1, batch, dtype)
            return empty["conv"][0], empty["state"][0]
        conv, state = (jax.lax.dynamic_index_in_dim(buffers[name], call.place, keepdims=False) for name in NAMES)
        return conv, state


NAMES = ("conv", "state")


def make_memory(config: Qwen35Config, layers: int, batch: int, dtype: DTypeLike) -> Memory:
    """The empty memories of a number of layers; states are float32."""
    conv = (layers, batch, config.linear_conv_kernel_dim - 1, config.conv_channels)
    state = (layers, batch, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    return {"conv": jnp.zeros(conv, dtype), "state": jnp.zeros(state, jnp.float32)}


def _with_memory(buffers: Memory | None, place: jax.Array, conv: jax.Array, state: jax.Array) -> Memory | None:
    """The buffers with one layer's memory in its place."""
    if buffers is None:
        return None
    new = {"conv": conv, "state": state}
    return {
        name: jax.lax.dynamic_update_index_in_dim(buffer, new[name].astype(buffer.dtype), place, axis=0)
        for name, buffer in buffers.items()
    }
