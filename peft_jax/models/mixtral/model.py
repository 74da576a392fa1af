"""Mixtral in Flax NNX: the numbers are those of transformers' `MixtralForCausalLM`."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.decoder import Decoder
from peft_jax.models.modules.decoder_blocks import SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ROUTED
from peft_jax.models.modules.mixture import Experts, SparseMLP, TopKRouter
from peft_jax.models.modules.mixture_backbone import MixtureBackbone


class MixtralModel(MixtureBackbone):
    """Embedding, stacked layers, final norm."""

    embedding_name = "embed_tokens"

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        return SelfAttention(self.config, dtype, rngs)

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        router = TopKRouter(self.config, dtype, rngs, normalised=True, wide=True)
        return SparseMLP(router, Experts(self.config, dtype, rngs, inner=self.config.intermediate_size))


class Mixtral(Decoder):
    """A Mixtral with the head of its task."""

    backbone_class = MixtralModel
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})
    takes = ROUTED
