"""Phi-3 and Phi-4 in Flax NNX: the numbers are those of transformers' `Phi3ForCausalLM` and kin with "sdpa" attention.

A long rope turns all positions of a call alike, by the longest text in it. When a text grows beyond the length of
pretraining while it is generated, the cache is computed again, as in transformers (`Phi3Config.renewed_at`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.decoder_config import heads_of
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import PreNormLayer
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.layers import RMSNorm, linear_maker
from peft_jax.models.modules.plain_blocks import FusedAttention
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.phi3.config import Phi3Config


class Phi3Attention(FusedAttention):
    """Self-attention with one projection to all queries, all keys and all values."""

    declared = ("o_proj", "qkv_proj")
    fused_name, out_name, grouped = "qkv_proj", "o_proj", False


class Phi3MLP(nnx.Module):
    """Gated feed-forward network with one projection to gate and input."""

    def __init__(self, config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, inner = linear_maker(config, dtype, rngs), config.intermediate_size
        self.act = config.hidden_act
        self.gate_up_proj = linear(config.hidden_size, 2 * inner, use_bias=False)
        self.down_proj = linear(inner, config.hidden_size, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        gate, up = jnp.split(kept(self.gate_up_proj(x)), 2, axis=-1)
        return self.down_proj(up * ACTIVATIONS[self.act](gate))


def make_layer(config: Phi3Config, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer with fused projections."""
    norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
    return PreNormLayer(Phi3Attention(config, dtype, rngs), Phi3MLP(config, dtype, rngs), norm, rates=config.rates)


class Phi3Model(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)


class Phi3(Decoder):
    """A Phi-3 with the head of its task."""

    backbone_class = Phi3Model
    head = DecoderHead(heads_of(Phi3Config.tasks))
