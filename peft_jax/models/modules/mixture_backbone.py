"""All of a decoder with a mixture of experts but its head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree
from peft_jax.models.mixture_config import DENSE, SPARSE
from peft_jax.models.modules.decoder import MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.mixture import Handed, MixtureLayer
from peft_jax.models.modules.rotary_backbone import RotaryBackbone


class MixtureBackbone(RotaryBackbone):
    """A backbone of a `peft_jax.models.mixture_config.MixtureConfig`.

    A subclass names its embedding, and makes attention and experts.
    """

    wide_routers: ClassVar[bool] = False  # whether routers compute in float32 whatever the dtype of hidden states

    def make_attention(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The attention of a layer."""
        raise NotImplementedError

    def make_experts(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The router and experts of a layer."""
        raise NotImplementedError

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm, and those of the layers."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)

    def make_dense(self, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward network of a layer without experts."""
        config = self.config
        return GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)

    def make_layer(self, dtype: DTypeLike) -> MakeLayer | Mapping[str, MakeLayer]:
        """A function that makes a layer from random streams; one a stack, where some layers have no experts."""

        def make(kind: str, rngs: nnx.Rngs) -> nnx.Module:
            mlp = self.make_experts if kind == SPARSE else self.make_dense
            return MixtureLayer(self.make_attention(dtype, rngs), mlp(dtype, rngs), partial(self.make_norm, dtype))

        if self.config.stacks:
            return {kind: partial(make, kind) for kind in (DENSE, SPARSE)}
        return partial(make, SPARSE if self.config.sparse_layers[0] else DENSE)

    def start(self, x: jax.Array, buffers: PyTree, inputs: ForwardInputs) -> Handed:
        """The cache's buffers, and places for the routers' logits if they are asked for."""
        if not inputs.output_router_logits:
            return Handed(buffers, None)
        batch, length, _ = x.shape
        shape = sum(self.config.sparse_layers), batch * length, self.config.num_experts
        return Handed(buffers, jnp.zeros(shape, jnp.float32 if self.wide_routers else x.dtype))

    def finish(self, handed: Handed) -> Any:
        """The cache's buffers."""
        return handed.cache

    def routers(self, handed: Handed) -> jax.Array | None:
        """The routers' logits."""
        return handed.router
