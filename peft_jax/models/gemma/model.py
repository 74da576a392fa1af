"""Gemma 1 and 2 and the text model of Gemma 3 in Flax NNX.

Attribute names are the module names of Hugging Face transformers; the layers are stacked and scanned by
`peft_jax.models.modules.decoder`. Numbers are those of transformers' classes with their default attention, which is
"eager" for Gemma 2, as its scores are capped.
"""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.gemma.config import SECOND, GemmaConfig
from peft_jax.models.modules.attention import Scoring
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View, views_by_kind
from peft_jax.models.modules.layers import WideRMSNorm
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.remat import kept


def make_norm(features: int, config: GemmaConfig, dtype: DTypeLike) -> WideRMSNorm:
    """A norm whose scale is counted from 1."""
    return WideRMSNorm(features, config.rms_norm_eps, dtype, offset=1)


class GemmaAttention(SelfAttention):
    """Self-attention with a scale of its own; Gemma 2 caps scores, Gemma 3 normalises queries and keys."""

    def __init__(self, config: GemmaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        # transformers computes Gemma 2 with "eager" attention, in which padding that sees nothing gets a mean.
        is_eager = config.model_type == SECOND
        bias, scoring = config.attention_bias, Scoring(config.scale, config.attn_logit_softcapping, is_eager)
        super().__init__(config, dtype, rngs, bias=bias, out_bias=bias, scoring=scoring)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = make_norm(config.head_dim, config, dtype)
            self.k_norm = make_norm(config.head_dim, config, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)


class GemmaDecoderLayer(nnx.Module):
    """Attention and feed-forward network, each normalised before, and after Gemma 1 behind too."""

    def __init__(self, config: GemmaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(make_norm, config.hidden_size, config, dtype)
        self.sandwiched = config.sandwiched
        self.self_attn = GemmaAttention(config, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_activation)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if config.sandwiched:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.self_attn(self.input_layernorm(x), call, buffers)
        if not self.sandwiched:
            x = kept(x + out.astype(x.dtype))
            return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), buffers
        x = kept(x + self.post_attention_layernorm(out).astype(x.dtype))
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out).astype(x.dtype), buffers


class GemmaModel(DecoderBackbone):
    """Scaled embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(GemmaDecoderLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return make_norm(self.config.hidden_size, self.config, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The views of full and sliding layers, each with a rope of its own."""
        config = self.config
        return views_by_kind(config, dict(config.ropes), places, inputs, x.dtype, window=config.sliding_window)


class Gemma(Decoder):
    """A Gemma with the head of its task."""

    backbone_class = GemmaModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})


class Gemma3(Gemma):
    """The text part of a multimodal Gemma 3."""

    backbone = "model.language_model"
