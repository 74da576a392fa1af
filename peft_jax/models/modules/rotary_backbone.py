"""All of a decoder with rotary positions but its head, for layers that differ in what they see and how they turn."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.models.modules.decoder import DecoderBackbone
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View, views_by_kind
from peft_jax.models.modules.layers import RMSNorm
from peft_jax.models.modules.positions import Places


class RotaryBackbone(DecoderBackbone):
    """A backbone of a `peft_jax.models.decoder_config.RotaryConfig`, whose windows and ropes it follows.

    A subclass names its embedding, and makes its layers, and its final norm where that is no RMSNorm.
    """

    interleaved: ClassVar[bool] = False  # as in `rotation`
    exact_turns: ClassVar[bool] = False  # whether queries and keys are turned in float32 whatever their dtype

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return RMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of each kind of layer, for embeddings x (batch, length, hidden)."""
        config = self.config
        dtype: DTypeLike = jnp.float32 if self.exact_turns else x.dtype
        window, pairs = config.window, self.interleaved
        return views_by_kind(config, config.ropes, places, inputs, dtype, window=window, interleaved=pairs)
