"""Ministral in Flax NNX: the numbers are those of transformers' `MinistralForCausalLM` and `Ministral3ForCausalLM`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.decoder_config import heads_of
from peft_jax.models.ministral.config import MinistralConfig
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rotary_backbone import RotaryBackbone


def make_layer(config: MinistralConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer; the growth of its queries is its view's."""
    attention = SelfAttention(config, dtype, rngs)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)
    return PreNormLayer(attention, mlp, partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype))


class MinistralModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of each kind of layer, with the factor of queries where they grow."""
        views, config = super().views(x, places, inputs), self.config
        if not config.growth:
            return views
        steps = (places.positions // config.growth_from).astype(jnp.float32)
        factor = (1 + config.growth * jnp.log(1 + steps)).astype(x.dtype)[:, :, None, None]
        return {kind: view._replace(query_factor=factor) for kind, view in views.items()}


class Ministral(Decoder):
    """A Ministral with the head of its task."""

    backbone_class = MinistralModel
    head = DecoderHead(heads_of(MinistralConfig.tasks))
