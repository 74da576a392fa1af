"""DeepSeek-V2 and V3 in Flax NNX.

The numbers are those of transformers' `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS
from peft_jax.models.deepseek.config import SECOND, DeepseekConfig
from peft_jax.models.deepseek.latent_attention import LatentAttention
from peft_jax.models.modules.decoder import Decoder
from peft_jax.models.modules.decoder_blocks import GatedMLP
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ROUTED, ForwardInputs
from peft_jax.models.modules.layer_views import View, views_by_kind
from peft_jax.models.modules.mixture import Choice, Experts, SparseMLP
from peft_jax.models.modules.mixture_backbone import MixtureBackbone
from peft_jax.models.modules.positions import Places


class DeepseekRouter(nnx.Module):
    """Chooses experts by scores in float32, perhaps among those of the best groups alone.

    V2's scores are a softmax, and a group is as good as its best expert. V3's are sigmoids, a bias is added to them for
    the choice alone, and a group is as good as its two best experts together.
    """

    def __init__(self, config: DeepseekConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        self.config = config
        self.kernel = nnx.Param(init(rngs.params(), (config.hidden_size, config.num_experts), dtype))
        if config.model_type != SECOND:
            self.e_score_correction_bias = nnx.Param(jnp.zeros((config.num_experts,), jnp.float32))

    def __call__(self, x: jax.Array) -> Choice:
        """Choose for x (tokens, hidden)."""
        config = self.config
        logits = x.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32)
        if config.model_type == SECOND:
            scores = worth = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            worth = scores + self.e_score_correction_bias[...][None]
        if config.chooses_groups:
            worth = self.within_groups(worth)
        _, experts = jax.lax.top_k(worth, config.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Choice(logits, weights * config.routed_scaling_factor, experts)

    def within_groups(self, worth: jax.Array) -> jax.Array:
        """The worth of experts (tokens, experts), with nothing below it for those that are not in the best groups."""
        count, chosen = self.config.groups
        groups = worth.reshape(len(worth), count, -1)
        judged = 1 if self.config.model_type == SECOND else 2
        of_group = jax.lax.top_k(groups, judged)[0].sum(axis=-1)
        _, best = jax.lax.top_k(of_group, chosen)
        is_best = jax.nn.one_hot(best, count, dtype=bool).any(axis=1)
        return jnp.where(is_best[..., None], groups, -jnp.inf).reshape(worth.shape)


class DeepseekMLP(SparseMLP):
    """As the base class, with one more expert that all tokens go through."""

    def __init__(self, config: DeepseekConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        inner, act = config.moe_intermediate_size, config.hidden_act
        super().__init__(DeepseekRouter(config, dtype, rngs), Experts(config, dtype, rngs, inner=inner))
        shared = inner * config.n_shared_experts
        self.shared_experts = GatedMLP(config, dtype, rngs, inner=shared, act=act, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x (batch, length, hidden); also gives the router's logits (batch * length, experts)."""
        out, logits = super().__call__(x)
        return out + self.shared_experts(x), logits


class DeepseekModel(MixtureBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"
    wide_routers = True

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        return LatentAttention(self.config, dtype, rngs)

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        return DeepseekMLP(self.config, dtype, rngs)

    def make_dense(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward network of a layer without experts."""
        config = self.config
        inner, act = config.intermediate_size, config.hidden_act
        return GatedMLP(config, dtype, rngs, inner=inner, act=act, bias=config.mlp_bias)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of all layers; V2 turns queries and keys in float32 whatever their dtype."""
        config = self.config
        dtype: DTypeLike = jnp.float32 if config.model_type == SECOND else x.dtype
        return views_by_kind(config, config.ropes, places, inputs, dtype, interleaved=config.is_paired)


class Deepseek(Decoder):
    """A DeepSeek with the head of its task."""

    backbone_class = DeepseekModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score"})
    takes = ROUTED - {"prefix", "adaption"}
