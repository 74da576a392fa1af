"""The Llama family in Flax NNX: Llama 1 to 3, Mistral, Qwen2 and Qwen3.

Attribute names are the module names of Hugging Face transformers (`model.layers.self_attn.q_proj.kernel`). The layers
are stacked: every leaf below `model.layers` has a leading axis of length num_hidden_layers, and the forward pass is
one `jax.lax.scan` over them, so that compile time does not grow with depth.

The model is plain Flax and knows nothing of adapters or quantization. Its numbers are those of transformers'
`LlamaForCausalLM` and kin with their default ("sdpa") attention.
"""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.decoder_config import heads_of
from peft_jax.models.llama.config import LlamaConfig
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View, views_by_kind
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.positions import Places


class LlamaAttention(SelfAttention):
    """Self-attention, with norms of queries and keys where the config has them."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.attention_bias, out_bias=bool(config.attention_out_bias))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)


def make_layer(config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> PreNormLayer:
    """A layer; queries and keys are normalised where the config says so."""
    attention = LlamaAttention(config, dtype, rngs)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act, bias=config.mlp_bias)
    return PreNormLayer(attention, mlp, partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype))


class LlamaModel(DecoderBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The views of full and sliding layers; positions turn queries and keys alike in both."""
        config = self.config
        ropes = dict.fromkeys(config.kinds, config.rope)
        return views_by_kind(config, ropes, places, inputs, x.dtype, window=config.sliding_window)


class Llama(Decoder):
    """A model of the Llama family with the head of its task.

    Example:
        >>> import jax.numpy as jnp
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> Llama(config, rngs=nnx.Rngs(0))(ForwardInputs(input_ids=jnp.array([[1, 2, 3]]))).logits.shape
        (1, 3, 16)
    """

    backbone_class = LlamaModel
    head = DecoderHead(heads_of(LlamaConfig.tasks))
