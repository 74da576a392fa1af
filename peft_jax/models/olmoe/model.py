"""OLMoE in Flax NNX: the numbers are those of transformers' `OlmoeForCausalLM`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.modules.decoder import Decoder
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ROUTED
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.mixture import Experts, SparseMLP, TopKRouter
from peft_jax.models.modules.mixture_backbone import MixtureBackbone
from peft_jax.models.modules.remat import kept
from peft_jax.models.olmoe.config import OlmoeConfig


class OlmoeAttention(SelfAttention):
    """Self-attention with norms over all heads' queries, and over all heads' keys, and limits to all three."""

    def __init__(self, config: OlmoeConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.attention_bias, out_bias=config.attention_bias)
        self.limit = config.clip_qkv
        self.q_norm = RMSNorm(config.num_attention_heads * config.head_size, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.kv_heads * config.head_size, config.rms_norm_eps, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k = self.q_norm(kept(self.q_proj(x))), self.k_norm(kept(self.k_proj(x)))
        return self.limited(q), self.limited(k), self.limited(kept(self.v_proj(x)))

    def limited(self, features: jax.Array) -> jax.Array:
        """Heads (batch, length, heads, head_dim) of features (batch, length, heads * head_dim), within the limit."""
        if self.limit is not None:
            features = jnp.clip(features, -self.limit, self.limit)
        return features.reshape(*features.shape[:2], -1, self.head_dim)


class OlmoeModel(MixtureBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        return OlmoeAttention(self.config, dtype, rngs)

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        router = TopKRouter(self.config, dtype, rngs, normalised=self.config.norm_topk_prob)
        return SparseMLP(router, Experts(self.config, dtype, rngs, inner=self.config.intermediate_size))


class Olmoe(Decoder):
    """An OLMoE with the head of its task."""

    backbone_class = OlmoeModel
    head = DecoderHead({CAUSAL_LM: "lm_head"})
    takes = ROUTED
