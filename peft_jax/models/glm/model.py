"""GLM-4 in Flax NNX: the numbers are those of transformers' `GlmForCausalLM` and `Glm4ForCausalLM`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.glm.config import GlmConfig
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import RMSNorm, linear_maker
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary_backbone import RotaryBackbone


class GlmMLP(nnx.Module):
    """Gated feed-forward network, gate and up as one projection: down(act(gate) * up)."""

    def __init__(self, config: GlmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.act = config.hidden_act
        self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size, use_bias=False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        gate, up = jnp.split(kept(self.gate_up_proj(x)), 2, axis=-1)
        return self.down_proj(ACTIVATIONS[self.act](gate) * up)


class GlmDecoderLayer(PreNormLayer):
    """Attention and feed-forward network, each normalised before, and in the later form behind too."""

    def __init__(self, config: GlmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
        attention = SelfAttention(config, dtype, rngs, bias=config.attention_bias, interleaved=True)
        super().__init__(attention, GlmMLP(config, dtype, rngs), norm)
        self.sandwiched = config.sandwiched
        if config.sandwiched:
            self.post_self_attn_layernorm, self.post_mlp_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        if not self.sandwiched:
            return super().__call__(x, call, buffers)
        out, buffers = self.self_attn(self.input_layernorm(x), call, buffers)
        x = kept(x + self.post_self_attn_layernorm(out).astype(x.dtype))
        out = self.mlp(self.post_attention_layernorm(x))
        return x + self.post_mlp_layernorm(out).astype(x.dtype), buffers


class GlmModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    interleaved = True

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(GlmDecoderLayer, self.config, dtype)


class Glm(Decoder):
    """A GLM-4 with the head of its task."""

    backbone_class = GlmModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
