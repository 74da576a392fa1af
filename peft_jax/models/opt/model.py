"""OPT in Flax NNX: the numbers are those of transformers' `OPTForCausalLM` and kin with "sdpa" attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import CAUSAL_LM, FULL, QUESTION_ANS, SEQ_CLS
from peft_jax.models.modules.base_dropout import Site, dropped, layer_or_input
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import Embed, LayerNorm, Unchanged, linear_maker
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.modules.positions import Places, check_room
from peft_jax.models.modules.remat import kept
from peft_jax.models.opt.config import OPTConfig

EPS = 1e-5  # PyTorch's default
OFFSET = 2  # rows of the table of positions before that of position 0; padding has the last of them


def make_norm(config: OPTConfig, dtype: DTypeLike) -> LayerNorm:
    """A norm of the hidden width."""
    return LayerNorm(config.hidden_size, EPS, dtype, affine=config.layer_norm_elementwise_affine)


def positions_of(places: Places, inputs: ForwardInputs) -> jax.Array:
    """Positions (batch or 1, length): those given, or else the tokens' numbers in their rows, -1 on padding."""
    if inputs.position_ids is not None or inputs.segment_ids is not None or inputs.attention_mask is None:
        return places.positions
    mask, length = inputs.attention_mask.astype(jnp.int32), places.mask.shape[1]
    room = places.mask.shape[2] - inputs.virtual
    mask = jnp.pad(mask, ((0, 0), (0, room - mask.shape[1])))
    counted = (inputs.virtual + jnp.cumsum(mask, axis=1)) * mask - 1
    return jax.lax.dynamic_slice_in_dim(counted, places.index, length, axis=1)


class OPTAttention(SelfAttention):
    """Self-attention without turns."""

    declared = ("k_proj", "v_proj", "q_proj")

    out_name = "out_proj"


class OPTDecoderLayer(nnx.Module):
    """Attention and feed-forward network, with norms of their inputs or of the sums that they are added to."""

    def __init__(self, config: OPTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, bias = linear_maker(config, dtype, rngs), config.enable_bias
        self.before, self.act, self.rates = config.do_layer_norm_before, config.activation_function, config.rates
        self.self_attn = OPTAttention(config, dtype, rngs, bias=bias, out_bias=bias)
        self.fc1 = linear(config.hidden_size, config.ffn_dim, use_bias=bias)
        self.fc2 = linear(config.ffn_dim, config.hidden_size, use_bias=bias)
        self.self_attn_layer_norm, self.final_layer_norm = make_norm(config, dtype), make_norm(config, dtype)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        whole, rates = x, self.rates
        seen = self.self_attn_layer_norm(x) if self.before else x
        out, buffers = self.self_attn(seen, call, buffers)
        out = dropped(out, call.key, rates.attention_out, Site.ATTENTION_OUT)
        x = kept(x + out.astype(x.dtype))
        if not self.before:
            x = self.self_attn_layer_norm(x)
        seen = self.final_layer_norm(x) if self.before else x
        added = self.fc2(ACTIVATIONS[self.act](kept(self.fc1(seen))))
        x = x + dropped(added, call.key, rates.mlp_out, Site.MLP_OUT).astype(x.dtype)
        x = x if self.before else self.final_layer_norm(x)
        return layer_or_input(x, whole, call.key, rates.layer), buffers


class OPTDecoder(DecoderBackbone):
    """Embeddings of tokens and positions, stacked layers, final norm, and projections of embeddings and output."""

    embedding_name, norm_name = "embed_tokens", "final_layer_norm"

    def add_embeddings(self, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Make the table of positions and both projections."""
        config, linear = self.config, linear_maker(self.config, dtype, rngs)
        self.embed_positions = Embed(config, dtype, rngs, config.max_position_embeddings + OFFSET)
        self.projects = config.embedding_size != config.hidden_size
        if self.projects:
            self.project_in = linear(config.embedding_size, config.hidden_size, use_bias=False)
            self.project_out = linear(config.hidden_size, config.embedding_size, use_bias=False)

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(OPTDecoderLayer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm, where there is one."""
        return make_norm(self.config, dtype) if self.config.ends_in_norm else Unchanged()

    def placed(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> jax.Array:
        """The layers' input for embeddings x (batch, length, embedding), positions added."""
        check_room(places, inputs, self.config.max_position_embeddings)
        x = self.project_in(x) if self.projects else x
        return x + self.embed_positions(positions_of(places, inputs) + OFFSET)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of all layers."""
        return {FULL: View(places.mask)}

    def leaving(self, x: jax.Array) -> jax.Array:
        """The head's input, for the last hidden state x (batch, length, hidden)."""
        return self.project_out(x) if self.projects else x


class OPTModel(OPTDecoder):
    """The decoder, as the one module in another, which PyTorch's names have."""

    def __init__(self, config: OPTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.decoder = OPTDecoder(config, dtype, rngs)

    @property
    def table(self) -> Embed:
        """The embedding of tokens."""
        return self.decoder.table

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Run all layers; the output has last and hidden states and the filled cache."""
        return self.decoder(inputs)


class OPT(Decoder):
    """An OPT with the head of its task."""

    backbone_class = OPTModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", QUESTION_ANS: "qa_outputs"})
