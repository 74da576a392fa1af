"""The text model of Gemma 4 in Flax NNX.

Attribute names are the module names of Hugging Face transformers, but that layers of each shape are a stack of their
own (`model.layers.sliding.self_attn.q_proj.kernel`); adapters and checkpoints have transformers' names. Numbers are
those of `Gemma4ForCausalLM` with its default ("sdpa") attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import present
from peft_jax.models.config import CAUSAL_LM, FULL, SLIDING
from peft_jax.models.gemma4.config import SHARING, SHORT, Gemma4Config
from peft_jax.models.modules.attention import Scoring, attend, dropping_of
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone, MakeLayer
from peft_jax.models.modules.decoder_blocks import GatedMLP, SelfAttention
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import MixedCache, extend
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layer_views import View, masks_by_kind, rotations_by_kind
from peft_jax.models.modules.layers import Embed, WideRMSNorm, linear_maker, normalized, scaled
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.remat import kept
from peft_jax.models.modules.rotary import rotate

Handed = dict[str, Any]  # what layers hand on: the "cache" of each stack, and keys and values "shared" with later ones


class Gemma4Attention(SelfAttention):
    """Self-attention with norms of queries, keys and values, or to the keys and values of an earlier layer."""

    def __init__(self, config: Gemma4Config, kind: str, shares: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.name, self.shares, self.eps = SHORT[kind], shares, config.rms_norm_eps
        self.k_is_v = config.attention_k_eq_v and kind == FULL
        kv_heads, size = config.heads_of(kind)
        bias = config.attention_bias
        one = Scoring(scale=1.0)
        super().__init__(config, dtype, rngs, bias=bias, out_bias=bias, scoring=one, head_dim=size, kv_heads=kv_heads)
        self.q_norm = WideRMSNorm(size, self.eps, dtype)
        if not shares:
            self.k_norm = WideRMSNorm(size, self.eps, dtype)

    def add_projections(self, hidden: int, n_q: int, n_kv: int, linear: Any, bias: bool) -> None:
        """Make the projections that there are."""
        self.q_proj = linear(hidden, n_q, use_bias=bias)
        if self.shares:
            return
        self.k_proj = linear(hidden, n_kv, use_bias=bias)
        if not self.k_is_v:
            self.v_proj = linear(hidden, n_kv, use_bias=bias)

    def own(self, x: jax.Array, call: LayerCall) -> tuple[jax.Array, jax.Array]:
        """Keys, turned, and values (batch, length, kv_heads, head_dim) of x (batch, length, hidden)."""
        shape = (*x.shape[:2], -1, self.head_dim)
        k = kept(self.k_proj(x)).reshape(shape)
        v = k if self.k_is_v else kept(self.v_proj(x)).reshape(shape)
        return rotate(self.k_norm(k), call.view.turn), normalized(v, self.eps).astype(v.dtype)

    def __call__(self, x: jax.Array, call: LayerCall, handed: Handed) -> tuple[jax.Array, Handed]:
        """Attend within x (batch, length, hidden)."""
        batch, length, _ = x.shape
        q = kept(self.q_proj(x)).reshape(batch, length, -1, self.head_dim)
        q = rotate(self.q_norm(q), call.view.turn)
        cache = handed["cache"]
        if self.shares:
            k, v = handed["shared"][self.name]
        else:
            k, v = self.own(x, call)
            k, v, buffers = extend(None if cache is None else cache[self.name], k, v, call.place, call.index)
            if cache is not None:
                handed = {**handed, "cache": {**cache, self.name: buffers}}
            if handed["shared"] is not None:  # the last of these layers is the one whose keys and values are shared
                handed = {**handed, "shared": {**handed["shared"], self.name: (k, v)}}
        dropping = dropping_of(call.key, self.rate)
        seen = attend(q, k, v, call.view.mask, causal=cache is None, scoring=self.scoring, dropping=dropping)
        return self.out(seen.reshape(batch, length, -1)), handed


class Gemma4DecoderLayer(nnx.Module):
    """Attention, feed-forward network and the layer's own embeddings, each normalised before and behind."""

    def __init__(self, config: Gemma4Config, kind: str, shares: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(WideRMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
        inner = config.intermediate_size * (2 if shares and config.use_double_wide_mlp else 1)
        self.act = config.hidden_activation
        self.self_attn = Gemma4Attention(config, kind, shares, dtype, rngs)
        self.mlp = GatedMLP(config, dtype, rngs, inner=inner, act=self.act)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.layer_scalar = nnx.Param(jnp.ones((1,), dtype))
        self.own_size = config.hidden_size_per_layer_input
        if self.own_size:
            linear = linear_maker(config, dtype, rngs)
            self.per_layer_input_gate = linear(config.hidden_size, self.own_size, use_bias=False)
            self.per_layer_projection = linear(self.own_size, config.hidden_size, use_bias=False)
            self.post_per_layer_input_norm = norm()

    def __call__(self, x: jax.Array, call: LayerCall, handed: Handed) -> tuple[jax.Array, Handed]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, handed = self.self_attn(self.input_layernorm(x), call, handed)
        x = kept(x + self.post_attention_layernorm(out).astype(x.dtype))
        out = self.mlp(self.pre_feedforward_layernorm(x))
        x = x + self.post_feedforward_layernorm(out).astype(x.dtype)
        if self.own_size:
            gate = ACTIVATIONS[self.act](self.per_layer_input_gate(x))
            out = self.per_layer_projection(gate * call.own)
            x = x + self.post_per_layer_input_norm(out).astype(x.dtype)
        return x * self.layer_scalar[...][None, None].astype(x.dtype), handed


class Gemma4TextModel(DecoderBackbone):
    """Scaled embedding, embeddings of each layer, stacks of layers, final norm."""

    embedding_name = "embed_tokens"
    declared = ("layers", "embed_tokens_per_layer", "per_layer_model_projection")

    def add_embeddings(self, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Make the embeddings of each layer, and what projects those of the tokens to them."""
        config, size = self.config, self.config.hidden_size_per_layer_input
        if not size:
            return
        width = config.num_hidden_layers * size
        count, untrained = config.vocab_size_per_layer_input, config.untrained_row
        self.embed_tokens_per_layer = Embed(config, dtype, rngs, count, width, untrained)
        linear = linear_maker(config, dtype, rngs)
        self.per_layer_model_projection = linear(config.hidden_size, width, use_bias=False)
        self.per_layer_projection_norm = WideRMSNorm(size, config.rms_norm_eps, dtype)

    def make_layer(self, dtype: DTypeLike) -> Mapping[str, MakeLayer]:
        """Functions that make a layer of each stack from random streams."""
        made = {}
        for kind, name in SHORT.items():
            made[name] = partial(Gemma4DecoderLayer, self.config, kind, False, dtype)
            made[name + SHARING] = partial(Gemma4DecoderLayer, self.config, kind, True, dtype)
        return made

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        return WideRMSNorm(self.config.hidden_size, self.config.rms_norm_eps, dtype)

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The views of full and sliding layers, each with a rope and a size of heads of its own."""
        config = self.config
        kinds = sorted(set(config.kinds))
        masks = masks_by_kind(places, inputs, kinds, window=config.sliding_window)
        ropes = present(dict(config.ropes), kinds)
        sizes = {FULL: config.global_head_dim, SLIDING: config.head_dim}
        turns = rotations_by_kind(ropes, sizes, places, config.max_position_embeddings, x.dtype)
        return {kind: View(masks[kind], turns[kind]) for kind in kinds}

    def per_layer(self, x: jax.Array, inputs: ForwardInputs) -> jax.Array | None:
        """The embeddings that each layer gets, (layers, batch, length, size)."""
        config, size = self.config, self.config.hidden_size_per_layer_input
        if not size:
            return None
        if inputs.input_ids is None:
            raise ValueError(
                f"inputs_embeds (and prompts of virtual tokens) are not supported where hidden_size_per_layer_input="
                f"{size}: each layer looks up embeddings of its own by id. Give input_ids."
            )
        shape = (*x.shape[:2], config.num_hidden_layers, size)
        projected = self.per_layer_model_projection(x) * config.hidden_size**-0.5
        looked_up = scaled(self.embed_tokens_per_layer(inputs.input_ids), size**0.5)
        own = self.per_layer_projection_norm(projected.reshape(shape)) + looked_up.reshape(shape)
        return jnp.moveaxis(own * 2**-0.5, 2, 0)

    def start(self, x: jax.Array, buffers: PyTree, inputs: ForwardInputs) -> Handed:
        """The caches of all stacks, and places for the keys and values that are shared."""
        config = self.config
        if not config.num_kv_shared_layers:
            return {"cache": buffers, "shared": None}
        slots = x.shape[1] if buffers is None else buffers[SHORT[config.kinds[0]]][0].shape[2]
        shared = {}
        for kind in sorted(set(config.kinds)):
            empty = jnp.zeros((x.shape[0], slots, *config.heads_of(kind)), x.dtype)
            shared[SHORT[kind]] = (empty, empty)
        return {"cache": buffers, "shared": shared}

    def finish(self, handed: Handed) -> Any:
        """The caches of all stacks."""
        return handed["cache"]


class Gemma4(Decoder):
    """The text model of a Gemma 4 with the head of its task."""

    backbone_class = Gemma4TextModel
    head = DecoderHead({CAUSAL_LM: "lm_head"})


class Gemma4Multimodal(Gemma4):
    """The text part of a multimodal Gemma 4."""

    backbone = "model.language_model"


def init_cache(config: Gemma4Config, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> MixedCache:
    """Make an empty cache for max_len positions.

    Example:
        >>> init_cache(Gemma4Config(num_hidden_layers=6), batch=3, max_len=5).buffers["full"][0].shape
        (1, 3, 5, 4, 512)
    """
    buffers = {}
    for kind in sorted(set(config.kinds)):
        shape = (config.stacks.count(SHORT[kind]), batch, max_len, *config.heads_of(kind))
        buffers[SHORT[kind]] = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return MixedCache(buffers, jnp.zeros((), jnp.int32))
