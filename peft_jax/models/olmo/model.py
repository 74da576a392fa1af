"""OLMo 2 and 3 in Flax NNX: the numbers are those of transformers' `Olmo2ForCausalLM` and `Olmo3ForCausalLM`."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import WideRMSNorm
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.olmo.config import OlmoConfig


class OlmoAttention(SelfAttention):
    """Self-attention with norms over all heads' queries, and over all heads' keys."""

    def __init__(self, config: OlmoConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.attention_bias, out_bias=config.attention_bias)
        self.q_norm = WideRMSNorm(config.num_attention_heads * config.head_size, config.rms_norm_eps, dtype)
        self.k_norm = WideRMSNorm(config.kv_heads * config.head_size, config.rms_norm_eps, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k = self.q_norm(kept(self.q_proj(x))), self.k_norm(kept(self.k_proj(x)))
        return q.reshape(shape), k.reshape(shape), kept(self.v_proj(x)).reshape(shape)


class OlmoDecoderLayer(nnx.Module):
    """Attention and feed-forward network, each normalised behind and added to the residual stream."""

    def __init__(self, config: OlmoConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(WideRMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = OlmoAttention(config, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)
        self.post_attention_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.self_attn(x, call, buffers)
        x = kept(x + self.post_attention_layernorm(out).astype(x.dtype))
        return x + self.post_feedforward_layernorm(self.mlp(x)).astype(x.dtype), buffers


class OlmoModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"
    exact_turns = True

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(OlmoDecoderLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return WideRMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)


class Olmo(Decoder):
    """An OLMo with the head of its task."""

    backbone_class = OlmoModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score"})
