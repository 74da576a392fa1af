"""Granite in Flax NNX: the numbers are those of transformers' `GraniteForCausalLM` with its default attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.granite.config import GraniteConfig
from peft_jax.models.modules.attention import Scoring
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layers import RMSNorm, multiplied
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rotary_backbone import RotaryBackbone


def make_layer(config: GraniteConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer whose scores and outputs are multiplied."""
    bias, scoring = config.attention_bias, Scoring(config.attention_multiplier)
    attention = SelfAttention(config, dtype, rngs, bias=bias, out_bias=bias, scoring=scoring)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act, bias=config.mlp_bias)
    norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
    return PreNormLayer(attention, mlp, norm, factor=config.residual_multiplier)


class GraniteModel(RotaryBackbone):
    """Multiplied embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def placed(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> jax.Array:
        """The layers' input for embeddings x (batch, length, hidden)."""
        return multiplied(x, self.config.embedding_multiplier)

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)


class Granite(Decoder):
    """A Granite with the head of its task."""

    backbone_class = GraniteModel
    head = DecoderHead({CAUSAL_LM: "lm_head"})
