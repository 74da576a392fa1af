"""gpt-oss in Flax NNX: the numbers are those of transformers' `GptOssForCausalLM`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.gpt_oss.config import GptOssConfig
from peft_jax.models.modules.decoder import Decoder
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.expert_parallel import Tensors
from peft_jax.models.modules.grouped_products import grouped_product
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ROUTED
from peft_jax.models.modules.layers import WideRMSNorm
from peft_jax.models.modules.mixture import Choice, Experts, SparseMLP
from peft_jax.models.modules.mixture_backbone import MixtureBackbone
from peft_jax.models.modules.remat import kept


class GptOssAttention(SelfAttention):
    """Self-attention with a sink in each head: a score that takes its part in the softmax and has no value."""

    def __init__(self, config: GptOssConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.attention_bias, out_bias=config.attention_bias)
        init = nnx.initializers.normal(config.initializer_range)
        self.sinks = nnx.Param(init(rngs.params(), (config.num_attention_heads,), dtype))

    @property
    def sink_scores(self) -> jax.Array:
        """The score of each head's sink (heads,)."""
        return self.sinks[...]


class GptOssRouter(nnx.Module):
    """Chooses the experts of the largest logits; their factors are a softmax over those alone."""

    def __init__(self, config: GptOssConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (config.hidden_size, config.num_experts), dtype))
        self.bias = nnx.Param(init(rngs.params(), (config.num_experts,), dtype))
        self.top_k = config.num_experts_per_tok

    def __call__(self, x: jax.Array) -> Choice:
        """Choose for x (tokens, hidden)."""
        logits = x @ self.kernel[...] + self.bias[...][None]
        largest, experts = jax.lax.top_k(logits, self.top_k)
        return Choice(logits, jax.nn.softmax(largest, axis=-1), experts)


class GptOssExperts(Experts):
    """Experts with biases, whose gates alternate with what they gate, both within limits."""

    tensor_names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

    def __init__(self, config: GptOssConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, experts = config.intermediate_size, config.num_experts
        super().__init__(config, dtype, rngs, inner=inner)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((experts, 2 * inner), dtype))
        self.down_proj_bias = nnx.Param(jnp.zeros((experts, config.hidden_size), dtype))

    def networks(self, tensors: Tensors, rows: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map rows (n, hidden), sorted by expert; arguments as in the base class."""
        product = grouped_product(rows, tensors["gate_up_proj"], sizes)
        inner = kept(product + tensors["gate_up_proj_bias"][experts])
        pairs = inner.reshape(len(rows), -1, 2)
        gate = jnp.minimum(pairs[..., 0], self.limit)
        up = jnp.clip(pairs[..., 1], -self.limit, self.limit)
        gated = (up + 1) * gate * jax.nn.sigmoid(gate * self.alpha)
        return grouped_product(gated, tensors["down_proj"], sizes) + tensors["down_proj_bias"][experts]


class GptOssMLP(SparseMLP):
    """A router and its experts."""

    router_name = "router"


class GptOssModel(MixtureBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        return GptOssAttention(self.config, dtype, rngs)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm, and those of the layers."""
        return WideRMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        return GptOssMLP(GptOssRouter(self.config, dtype, rngs), GptOssExperts(self.config, dtype, rngs))


class GptOss(Decoder):
    """A gpt-oss with the head of its task."""

    backbone_class = GptOssModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
    takes = ROUTED
