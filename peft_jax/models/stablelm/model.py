"""StableLM in Flax NNX: the numbers are those of transformers' `StableLmForCausalLM` with its default attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, ParallelLayer, PreNormLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.rotary_backbone import RotaryBackbone
from peft_jax.models.stablelm.config import StableLmConfig


class NumberedNorms(nnx.Module):
    """Norms without a bias, by number, as transformers' checkpoints have them."""

    def __init__(self, count: int, features: int, eps: float, dtype: DTypeLike) -> None:
        self.count = count
        for number in range(count):
            setattr(self, str(number), LayerNorm(features, eps, dtype, bias=False))


class NormOfEachHead(nnx.Module):
    """A norm of its own for each head."""

    def __init__(self, heads: int, config: StableLmConfig, dtype: DTypeLike) -> None:
        self.norms = NumberedNorms(heads, config.head_size, config.layer_norm_eps, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis of x (batch, length, heads, head_dim)."""
        numbers = range(self.norms.count)
        return jnp.stack([getattr(self.norms, str(number))(x[:, :, number]) for number in numbers], axis=2)


class StableLmAttention(SelfAttention):
    """Self-attention, with norms of queries and keys where the config has them."""

    def __init__(self, config: StableLmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype, rngs, bias=config.use_qkv_bias)
        self.normalised = config.qk_layernorm
        if config.qk_layernorm:
            self.q_layernorm = NormOfEachHead(config.num_attention_heads, config, dtype)
            self.k_layernorm = NormOfEachHead(config.kv_heads, config, dtype)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return (self.q_layernorm(q), self.k_layernorm(k), v) if self.normalised else (q, k, v)


def make_layer(config: StableLmConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> ParallelLayer | PreNormLayer:
    """A layer in one of the two forms of the residual stream."""
    attention = StableLmAttention(config, dtype, rngs)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)
    norm = partial(LayerNorm, config.hidden_size, config.layer_norm_eps, dtype)
    if config.use_parallel_residual:
        return ParallelLayer(attention, mlp, norm(), rates=config.rates)
    return PreNormLayer(attention, mlp, norm, rates=config.rates)


class StableLmModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return LayerNorm(self.config.hidden_size, self.config.layer_norm_eps, dtype)


class StableLm(Decoder):
    """A StableLM with the head of its task."""

    backbone_class = StableLmModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
