"""GPT-NeoX and Pythia in Flax NNX: the numbers are those of transformers' classes with their default attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.gpt_neox.config import GPTNeoXConfig
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.plain_blocks import FusedAttention, PlainMLP
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone

PROJECTIONS = ("dense_h_to_4h", "dense_4h_to_h")


class GPTNeoXLayer(nnx.Module):
    """Attention and feed-forward network, each of its own norm, side by side or one behind the other."""

    def __init__(self, config: GPTNeoXConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, act, bias = config.intermediate_size, config.hidden_act, config.attention_bias
        self.parallel, self.rates = config.use_parallel_residual, config.rates
        self.attention = FusedAttention(config, dtype, rngs, bias=bias, out_bias=bias)
        self.mlp = PlainMLP(config, dtype, rngs, names=PROJECTIONS, inner=inner, act=act)
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.attention(self.input_layernorm(x), call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        after = kept(x + out.astype(x.dtype))
        seen = x if self.parallel else after
        added = self.mlp(self.post_attention_layernorm(seen))
        return after + dropped(added, call.key, self.rates.mlp_out, Site.MLP_OUT).astype(x.dtype), buffers


class GPTNeoXModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name, norm_name = "embed_in", "final_layer_norm"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(GPTNeoXLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, dtype)


class GPTNeoX(Decoder):
    """A GPT-NeoX with the head of its task."""

    backbone, backbone_class = "gpt_neox", GPTNeoXModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "classifier", QUESTION_ANS: "qa_outputs"})
