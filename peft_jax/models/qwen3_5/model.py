"""Qwen3.5's text model in Flax NNX.

Attribute names are the module names of Hugging Face transformers. Layers of linear attention and of full attention have
a stack each, which is no part of their names: `model.layers.linear.linear_attn.out_proj.kernel` holds the
kernels of `model.layers.0.linear_attn.out_proj`, `model.layers.1.linear_attn.out_proj` and so on.

The numbers are those of transformers' `Qwen3_5ForCausalLM` with its PyTorch code for the gated delta rule and its
default ("sdpa") attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import CAUSAL_LM, FULL, LINEAR, SEQ_CLS
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, attend_within
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import CAUSAL, ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers, MixedCache, make_cache
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View, steps_of
from peft_jax.models.modules.layers import WideRMSNorm, linear_maker
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary import rotate, rotation
from peft_jax.models.qwen3_5.config import STACKS, Qwen35Config
from peft_jax.models.qwen3_5.linear_attention import GatedDeltaNet, make_memory


class GatedAttention(nnx.Module):
    """Self-attention with norms of queries and keys, and a gate of each feature of its outputs.

    The projection of queries has twice their features: in each head those of the query, then those of its gate.
    """

    def __init__(self, config: Qwen35Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        hidden, bias = config.hidden_size, config.attention_bias
        n_q, n_kv = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim, self.rate = config.head_dim, config.rates.attention
        self.q_proj = linear(hidden, 2 * n_q, use_bias=bias)
        self.k_proj = linear(hidden, n_kv, use_bias=bias)
        self.v_proj = linear(hidden, n_kv, use_bias=bias)
        self.o_proj = linear(n_q, hidden, use_bias=bias)
        self.q_norm = WideRMSNorm(config.head_dim, config.rms_norm_eps, dtype, offset=1)
        self.k_norm = WideRMSNorm(config.head_dim, config.rms_norm_eps, dtype, offset=1)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
        """Attend within x (batch, length, hidden), and to this layer's part of the cache's buffers."""
        batch, length, _ = x.shape
        both = kept(self.q_proj(x)).reshape(batch, length, -1, 2 * self.head_dim)
        q, gate = jnp.split(both, 2, axis=-1)
        k, v = (kept(project(x)).reshape(batch, length, -1, self.head_dim) for project in (self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), call.view.turn), rotate(self.k_norm(k), call.view.turn)
        seen, buffers = attend_within(q, k, v, call, buffers, rate=self.rate)
        return self.o_proj((seen * jax.nn.sigmoid(gate)).reshape(batch, length, -1)), buffers


class Qwen35Layer(nnx.Module):
    """Attention of one of two kinds and a feed-forward network, each normalised before and added to the stream."""

    def __init__(self, config: Qwen35Config, dtype: DTypeLike, kind: str, rngs: nnx.Rngs) -> None:
        self.kind = kind
        if kind == LINEAR:
            self.linear_attn = GatedDeltaNet(config, dtype, rngs)
        else:
            self.self_attn = GatedAttention(config, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs, inner=config.intermediate_size, act=config.hidden_act)
        self.input_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps, dtype, offset=1)
        self.post_attention_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps, dtype, offset=1)

    def __call__(self, x: jax.Array, call: LayerCall, buffers: PyTree) -> tuple[jax.Array, Any]:
        """Map x (batch, length, hidden); the buffers are those of both stacks, by name."""
        mix = self.linear_attn if self.kind == LINEAR else self.self_attn
        own = None if buffers is None else buffers[call.stack]
        out, own = mix(self.input_layernorm(x), call, own)
        x = kept(x + out.astype(x.dtype))
        x = x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype)
        return x, None if buffers is None else {**buffers, call.stack: own}


class Qwen35Model(DecoderBackbone):
    """Embedding, layers in two stacks, final norm."""

    embedding_name = "embed_tokens"

    def make_layer(self, dtype: DTypeLike) -> dict[str, MakeLayer]:
        """Functions that make a layer of each stack from random streams."""
        return {name: partial(Qwen35Layer, self.config, dtype, kind) for kind, name in STACKS.items()}

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return WideRMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype, offset=1)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The views of both kinds of layers: what attention sees, and the tokens that linear attention reads."""
        config = self.config
        turn = rotation(config.rope, config.head_dim, places.positions, config.max_position_embeddings, x.dtype)
        return {FULL: View(places.mask, turn), LINEAR: View(places.mask, steps=steps_of(places, inputs))}


class Qwen35(Decoder):
    """Qwen3.5's text model with the head of its task.

    Keys and values of a prompt (`prefix`) are not taken, as most layers have none.

    Example:
        >>> config = Qwen35Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=4,
        ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1,
        ...                       linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4)
        >>> Qwen35(config, rngs=nnx.Rngs(0))(ForwardInputs(input_ids=jnp.array([[1, 2, 3]]))).logits.shape
        (1, 3, 16)
    """

    backbone_class = Qwen35Model
    head = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score"})
    takes = CAUSAL - {"prefix", "adaption"}


class Qwen35Multimodal(Qwen35):
    """Qwen3.5's text model under the names that its modules have in the model with images."""

    backbone = "model.language_model"


def init_cache(config: Qwen35Config, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> MixedCache:
    """An empty cache: keys and values of max_len positions, and memories whose size depends on no length.

    Example:
        >>> init_cache(Qwen35Config(num_hidden_layers=4), batch=3, max_len=5).buffers["linear"]["state"].shape
        (3, 3, 32, 128, 128)
    """
    attending, linear = config.kinds.count(FULL), config.kinds.count(LINEAR)
    attended = make_cache(attending, batch, max_len, config.kv_heads, config.head_dim, dtype)
    memories = make_memory(config, linear, batch, dtype)
    return MixedCache({STACKS[FULL]: attended.buffers, STACKS[LINEAR]: memories}, attended.index)
