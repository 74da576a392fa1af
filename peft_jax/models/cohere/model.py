"""Cohere's models in Flax NNX: the numbers are those of transformers' `CohereForCausalLM` and `Cohere2ForCausalLM`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.cohere.config import CohereConfig
from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.modules.decoder import Decoder, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, ParallelLayer, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import LayerNorm
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rotary_backbone import RotaryBackbone


def make_norm(config: CohereConfig, dtype: DTypeLike, heads: int | None = None) -> LayerNorm:
    """A norm without a bias: of hidden features, or of heads' features with a scale of its own for each head."""
    features = config.hidden_size if heads is None else (heads, config.head_size)
    return LayerNorm(features, config.layer_norm_eps, dtype, bias=False)


class CohereAttention(SelfAttention):
    """Self-attention, with norms of queries and keys where the config has them."""

    def __init__(self, config: CohereConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        bias = config.attention_bias
        super().__init__(config, dtype, rngs, bias=bias, out_bias=bias, interleaved=True)
        self.normalised = config.use_qk_norm
        if config.use_qk_norm:
            self.q_norm = make_norm(config, dtype, config.num_attention_heads)
            self.k_norm = make_norm(config, dtype, config.kv_heads)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden), not yet turned."""
        q, k, v = super().heads(x)
        return (self.q_norm(q), self.k_norm(k), v) if self.normalised else (q, k, v)


def make_layer(config: CohereConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> ParallelLayer:
    """A layer whose attention and feed-forward network are side by side."""
    attention = CohereAttention(config, dtype, rngs)
    mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)
    return ParallelLayer(attention, mlp, make_norm(config, dtype))


class CohereModel(RotaryBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    interleaved = True

    def make_layer(self, dtype: DTypeLike) -> MakeLayer:
        """A function that makes a layer from random streams."""
        return partial(make_layer, self.config, dtype)

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return make_norm(self.config, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of each kind of layer; cosines and sines have x's digits, and turn queries and keys in float32."""
        views = super().views(x, places, inputs)
        return {kind: view._replace(turn=jax.tree.map(widened, view.turn)) for kind, view in views.items()}


def widened(array: jax.Array) -> jax.Array:
    """The array in float32, or in its own element type if that is wider."""
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


class Cohere(Decoder):
    """A Command R with the head of its task."""

    backbone_class = CohereModel
    head = DecoderHead({CAUSAL_LM: "lm_head"})
