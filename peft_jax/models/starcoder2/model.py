"""StarCoder2 in Flax NNX: the numbers are those of transformers' `Starcoder2ForCausalLM` with its default attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.layers import LayerNorm, linear_maker
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.starcoder2.config import Starcoder2Config


class Starcoder2MLP(nnx.Module):
    """Feed-forward network: c_proj(act(c_fc(x)))."""

    def __init__(self, config: Starcoder2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.act = config.hidden_act
        self.c_fc = linear(config.hidden_size, config.intermediate_size, use_bias=config.use_bias)
        self.c_proj = linear(config.intermediate_size, config.hidden_size, use_bias=config.use_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        return self.c_proj(ACTIVATIONS[self.act](kept(self.c_fc(x))))


def make_layer(config: Starcoder2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer; all of its projections have a bias, or none."""
    attention = SelfAttention(config, dtype, rngs, bias=config.use_bias, out_bias=config.use_bias)
    norm = partial(LayerNorm, config.hidden_size, config.norm_epsilon, dtype)
    return PreNormLayer(attention, Starcoder2MLP(config, dtype, rngs), norm, rates=config.rates)


class Starcoder2Model(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.norm_epsilon, dtype)


class Starcoder2(Decoder):
    """A StarCoder2 with the head of its task."""

    backbone_class = Starcoder2Model
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
