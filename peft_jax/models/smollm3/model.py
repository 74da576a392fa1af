"""SmolLM3 in Flax NNX: the numbers are those of transformers' `SmolLM3ForCausalLM` with its default attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.decoder_config import heads_of
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View, masks_by_kind, rotations_by_kind
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.smollm3.config import STILL, SmolLM3Config


def make_layer(config: SmolLM3Config, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer; whether it turns queries and keys is its view's."""
    bias = config.attention_bias
    attention = SelfAttention(config, dtype, rngs, bias=bias, out_bias=bias)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act, bias=config.mlp_bias)
    return PreNormLayer(attention, mlp, partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype))


class SmolLM3Model(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of each kind of layer: two masks, each with and without rotations."""
        config = self.config
        masks = masks_by_kind(places, inputs, set(config.layer_types), window=config.window)
        masks |= {STILL[kind]: mask for kind, mask in masks.items()}
        turns = rotations_by_kind(config.ropes, config.head_size, places, config.max_position_embeddings, x.dtype)
        return {kind: View(masks[kind], turns[kind]) for kind in sorted(turns)}


class SmolLM3(Decoder):
    """A SmolLM3 with the head of its task."""

    backbone_class = SmolLM3Model
    head = DecoderHead(heads_of(SmolLM3Config.tasks))
