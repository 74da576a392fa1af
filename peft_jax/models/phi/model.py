"""Phi-1 to Phi-2 in Flax NNX: the numbers are those of transformers' `PhiForCausalLM` and kin with "sdpa" attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.decoder_config import heads_of
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.plain_blocks import PlainMLP
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.phi.config import PhiConfig


class PhiAttention(SelfAttention):
    """Self-attention with biases, and norms of queries and keys where the config has them."""

    out_name = "dense"

    def __init__(self, config: PhiConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=True, out_bias=True)
        self.qk_norm = config.qk_layernorm
        if self.qk_norm:
            self.q_layernorm = LayerNorm(config.head_size, config.layer_norm_eps, dtype)
            self.k_layernorm = LayerNorm(config.head_size, config.layer_norm_eps, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return (self.q_layernorm(q), self.k_layernorm(k), v) if self.qk_norm else (q, k, v)


class PhiDecoderLayer(nnx.Module):
    """Attention and feed-forward network side by side, of the same norm."""

    def __init__(self, config: PhiConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, act, self.rates = config.intermediate_size, config.hidden_act, config.rates
        self.self_attn = PhiAttention(config, dtype, rngs)
        self.mlp = PlainMLP(config, dtype, rngs, names=("fc1", "fc2"), inner=inner, act=act)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        normed = self.input_layernorm(x)
        out, buffers = self.self_attn(normed, call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        added = dropped(self.mlp(normed), call.key, self.rates.mlp_out, Site.MLP_OUT)
        return x + (out + added).astype(x.dtype), buffers


class PhiModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name, norm_name = "embed_tokens", "final_layernorm"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(PhiDecoderLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, dtype)


class Phi(Decoder):
    """A Phi with the head of its task."""

    backbone_class = PhiModel
    head = DecoderHead(heads_of(PhiConfig.tasks), lm_bias=True)
