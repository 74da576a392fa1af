"""Qwen's mixtures of experts in Flax NNX.

The numbers are those of transformers' `Qwen2MoeForCausalLM` and `Qwen3MoeForCausalLM`.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.decoder import Decoder
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ROUTED
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.mixture import Experts, SharedExpertMLP, SparseMLP, TopKRouter
from peft_jax.models.modules.mixture_backbone import MixtureBackbone
from peft_jax.models.qwen_moe.config import SECOND, QwenMoeConfig


class NormalisedAttention(SelfAttention):
    """Self-attention with norms of each head's queries and keys."""

    def __init__(self, config: QwenMoeConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.attention_bias, out_bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class QwenMoeModel(MixtureBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        if self.config.model_type == SECOND:
            return SelfAttention(self.config, dtype, rngs, bias=self.config.qkv_bias)
        return NormalisedAttention(self.config, dtype, rngs)

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        config = self.config
        router = TopKRouter(config, dtype, rngs, normalised=config.norm_topk_prob)
        experts = Experts(config, dtype, rngs, inner=config.moe_intermediate_size)
        if config.model_type != SECOND:
            return SparseMLP(router, experts)
        return SharedExpertMLP(router, experts, config, dtype, rngs, inner=config.shared_expert_intermediate_size)


class QwenMoe(Decoder):
    """A Qwen with experts and the head of its task."""

    backbone_class = QwenMoeModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
    takes = ROUTED
