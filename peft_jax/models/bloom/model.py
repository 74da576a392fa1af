"""BLOOM in Flax NNX: the numbers are those of transformers' `BloomForCausalLM` and kin with their "eager" attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.bloom.config import BloomConfig
from peft_jax.models.config import CAUSAL_LM, FULL, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.alibi import alibi
from peft_jax.models.modules.attention import Scoring
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.plain_blocks import FusedAttention, PlainMLP
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.remat import kept

PROJECTIONS = ("dense_h_to_4h", "dense_4h_to_h")


class BloomBlock(nnx.Module):
    """Attention and feed-forward network, each normalised before and added to the residual stream, or to the norm."""

    def __init__(self, config: BloomConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(LayerNorm, config.hidden_size, config.layer_norm_epsilon, dtype)
        self.adds_to_norm, self.rates = config.apply_residual_connection_post_layernorm, config.rates
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attention = FusedAttention(
            config, dtype, rngs, bias=True, out_bias=True, scoring=Scoring(finite=True)
        )
        self.mlp = PlainMLP(config, dtype, rngs, names=PROJECTIONS, inner=4 * config.hidden_size, act="gelu_new")

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        normed = self.input_layernorm(x)
        out, buffers = self.self_attention(normed, call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        x = kept((normed if self.adds_to_norm else x) + out.astype(x.dtype))
        normed = self.post_attention_layernorm(x)
        added = dropped(self.mlp(normed), call.key, self.rates.mlp_out, Site.MLP_OUT)
        return (normed if self.adds_to_norm else x) + added.astype(x.dtype), buffers


class BloomModel(DecoderBackbone):
    """Normalised embedding, stacked layers, final norm."""

    embedding_name, layers_name, norm_name = "word_embeddings", "h", "ln_f"

    def add_embeddings(self, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Make the norm of embeddings."""
        self.word_embeddings_layernorm = self.make_norm(dtype)

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(BloomBlock, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> LayerNorm:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_epsilon, dtype)

    def placed(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> jax.Array:
        """The layers' input for embeddings x (batch, length, hidden)."""
        return self.word_embeddings_layernorm(x)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of all layers; their scores grow along the keys."""
        return {FULL: View(places.mask, bias=alibi(self.config.num_attention_heads, places, inputs, x.dtype))}


class Bloom(Decoder):
    """A BLOOM with the head of its task."""

    backbone, backbone_class = "transformer", BloomModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "classifier", QUESTION_ANS: "qa_outputs"})
