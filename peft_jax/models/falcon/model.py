"""Falcon in Flax NNX: the numbers are those of transformers' `FalconForCausalLM` and kin with "sdpa" attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, FULL, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.falcon.config import FalconConfig
from peft_jax.models.modules.alibi import alibi
from peft_jax.models.modules.attention import Scoring
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.plain_blocks import FusedAttention, PlainMLP
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone

PROJECTIONS = ("dense_h_to_4h", "dense_4h_to_h")


class FalconDecoderLayer(nnx.Module):
    """Attention and feed-forward network, side by side of one norm or two, or one behind the other."""

    def __init__(self, config: FalconConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, act, bias = config.intermediate_size, config.hidden_act, config.bias
        norm = partial(LayerNorm, config.hidden_size, config.layer_norm_epsilon, dtype)
        scoring = Scoring(finite=config.alibi)  # transformers then adds the mask to the bias
        self.parallel, self.two_norms, self.rates = config.parallel_attn, config.two_norms, config.rates
        self.self_attention = FusedAttention(config, dtype, rngs, bias=bias, out_bias=bias, scoring=scoring)
        self.mlp = PlainMLP(config, dtype, rngs, names=PROJECTIONS, inner=inner, act=act, bias=bias)
        if self.two_norms:
            self.ln_attn, self.ln_mlp = norm(), norm()
        else:
            self.input_layernorm = norm()
        if not self.parallel:
            self.post_attention_layernorm = norm()

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        normed = self.ln_attn(x) if self.two_norms else self.input_layernorm(x)
        out, buffers = self.self_attention(normed, call, buffers)
        if not self.parallel:
            out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
            x = kept(x + out.astype(x.dtype))
            added = self.mlp(self.post_attention_layernorm(x))
        else:  # both outputs are dropped as one
            added = kept(out) + self.mlp(self.ln_mlp(x) if self.two_norms else normed)
        return x + dropped(added, call.key, self.rates.mlp_out, Site.MLP_OUT).astype(x.dtype), buffers


class FalconModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name, layers_name, norm_name = "word_embeddings", "h", "ln_f"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(FalconDecoderLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_epsilon, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of all layers, in which positions turn heads, or scores grow along the keys."""
        if not self.config.alibi:
            return super().views(x, places, inputs)
        heads, size = self.config.num_attention_heads, self.config.head_size
        bias = alibi(heads, places, inputs, jnp.bfloat16).astype(x.dtype)  # as transformers rounds it
        return {FULL: View(places.mask, bias=bias / size**0.5)}


class Falcon(Decoder):
    """A Falcon with the head of its task."""

    backbone, backbone_class = "transformer", FalconModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "classifier", QUESTION_ANS: "qa_outputs"})
