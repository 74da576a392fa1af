"""Multi-head latent attention: keys and values of all heads come from one short vector a token, which the cache keeps.

DeepSeek-AI, 2024, https://arxiv.org/abs/2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree
from peft_jax.models.deepseek.config import DeepseekConfig
from peft_jax.models.modules.attention import Scoring, attend, dropping_of
from peft_jax.models.modules.kv_cache import KVCache, extend
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import RMSNorm, linear_maker
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary import rotate, score_factor

EPS = 1e-6  # of the norms within the attention, whatever rms_norm_eps says


class LatentAttention(nnx.Module):
    """Causal self-attention over keys and values that are projected from the cache's vectors."""

    def __init__(self, config: DeepseekConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.turned, self.unturned, self.rank = config.qk_rope_head_dim, config.qk_nope_head_dim, config.kv_lora_rank
        self.values, self.paired, self.rate = config.v_head_dim, config.is_paired, config.rates.attention
        self.compressed = config.q_lora_rank is not None
        scale = (self.turned + self.unturned) ** -0.5
        self.scoring = Scoring(scale * score_factor(config.rope, config.max_position_embeddings))
        linear, hidden, heads = linear_maker(config, dtype, rngs), config.hidden_size, config.num_attention_heads
        bias, queries = config.attention_bias, heads * (self.turned + self.unturned)
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, queries, use_bias=False)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank, use_bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, EPS, dtype)
            self.q_b_proj = linear(config.q_lora_rank, queries, use_bias=False)
        self.kv_a_proj_with_mqa = linear(hidden, self.rank + self.turned, use_bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, EPS, dtype)
        self.kv_b_proj = linear(self.rank, heads * (self.unturned + self.values), use_bias=False)
        self.o_proj = linear(heads * self.values, hidden, use_bias=bias)

    def queries(self, x: jax.Array, call: LayerCall) -> jax.Array:
        """Queries (batch, length, heads, unturned + turned features) of x (batch, length, hidden)."""
        if self.compressed:
            flat = kept(self.q_b_proj(self.q_a_layernorm(kept(self.q_a_proj(x)))))
        else:
            flat = kept(self.q_proj(x))
        q = flat.reshape(*x.shape[:2], -1, self.unturned + self.turned)
        turned = rotate(q[..., self.unturned :], call.view.turn, interleaved=self.paired)
        return jnp.concatenate([q[..., : self.unturned], turned], axis=-1)

    def latents(self, x: jax.Array, call: LayerCall) -> tuple[jax.Array, jax.Array]:
        """The arrays that the cache keeps of x (batch, length, hidden): a vector, and turned keys, as of one head."""
        both = kept(self.kv_a_proj_with_mqa(x))
        latent = self.kv_a_layernorm(both[..., : self.rank])
        turned = rotate(both[..., None, self.rank :], call.view.turn, interleaved=self.paired)
        return latent[:, :, None], turned

    def expanded(self, latent: jax.Array, turned: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values (batch, kv_len, heads, features) of what `latents` gives."""
        flat = kept(self.kv_b_proj(latent[:, :, 0]))
        both = flat.reshape(*flat.shape[:2], -1, self.unturned + self.values)
        shared = jnp.broadcast_to(turned, (*both.shape[:3], self.turned))
        k = jnp.concatenate([both[..., : self.unturned], shared], axis=-1)
        return k, both[..., self.unturned :]

    def __call__(self, x: jax.Array, call: LayerCall, buffers: PyTree) -> tuple[jax.Array, Any]:
        """Attend within x (batch, length, hidden), and to this layer's part of the cache's buffers."""
        q = self.queries(x, call)
        latent, turned = self.latents(x, call)
        latent, turned, buffers = extend(buffers, latent, turned, call.place, call.index)
        k, v = self.expanded(latent, turned)
        dropping = dropping_of(call.key, self.rate)
        seen = attend(q, k, v, call.view.mask, causal=buffers is None, scoring=self.scoring, dropping=dropping)
        return self.o_proj(seen.reshape(*x.shape[:2], -1)), buffers


def init_cache(config: DeepseekConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Make an empty cache for max_len positions: the vectors in place of keys, the turned keys in place of values.

    Example:
        >>> cache = init_cache(DeepseekConfig(num_hidden_layers=2), batch=3, max_len=5)
        >>> cache.keys.shape, cache.values.shape
        ((2, 3, 5, 1, 512), (2, 3, 5, 1, 64))
    """
    shape = config.num_hidden_layers, batch, max_len, 1
    vectors = jnp.zeros((*shape, config.kv_lora_rank), dtype)
    keys = jnp.zeros((*shape, config.qk_rope_head_dim), dtype)
    return KVCache(vectors, keys, jnp.zeros((), jnp.int32))
