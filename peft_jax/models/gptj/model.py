"""GPT-J in Flax NNX: the numbers are those of transformers' `GPTJForCausalLM` and kin with their "eager" attention."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, FULL, QUESTION_ANS, SEQ_CLS
from peft_jax.models.gptj.config import GPTJConfig
from peft_jax.models.modules.attention import Scoring
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import CAUSAL, ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.plain_blocks import PlainMLP
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rope_parameters import RopeParameters
from peft_jax.models.modules.rotary import rotation

SCORING = Scoring(finite=True)


class GPTJAttention(SelfAttention):
    """Self-attention that turns neighbouring features."""

    declared = ("k_proj", "v_proj", "q_proj")

    out_name = "out_proj"


class GPTJBlock(nnx.Module):
    """Attention and feed-forward network side by side, of the same norm."""

    def __init__(self, config: GPTJConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, act = config.n_inner or 4 * config.hidden_size, config.activation_function
        self.rates = config.rates
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype)
        self.attn = GPTJAttention(config, dtype, rngs, scoring=SCORING, interleaved=True)
        self.mlp = PlainMLP(config, dtype, rngs, names=("fc_in", "fc_out"), inner=inner, act=act)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        normed = self.ln_1(x)
        out, buffers = self.attn(normed, call, buffers)
        out = dropped(out, call.key, self.rates.attention_out, Site.ATTENTION_OUT)
        added = dropped(self.mlp(normed), call.key, self.rates.mlp_out, Site.MLP_OUT)
        return x + (out + added).astype(x.dtype), buffers


class GPTJModel(DecoderBackbone):
    """Embedding of tokens and types, stacked layers, final norm."""

    embedding_name, layers_name, norm_name = "wte", "h", "ln_f"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(GPTJBlock, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_epsilon, dtype)

    def placed(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> jax.Array:
        """The layers' input for embeddings x (batch, length, hidden); types are tokens."""
        return x if inputs.token_type_ids is None else x + self.table(inputs.token_type_ids)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of all layers, in which positions turn the first features of a head."""
        size, length = self.config.rotary_dim, self.config.max_position_embeddings
        turn = rotation(RopeParameters(), size, places.positions, length, x.dtype, interleaved=True)
        return {FULL: View(places.mask, turn)}


class GPTJ(Decoder):
    """A GPT-J with the head of its task."""

    backbone, backbone_class = "transformer", GPTJModel
    takes = CAUSAL | {"token_type_ids"}
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", QUESTION_ANS: "qa_outputs"}, lm_bias=True)
