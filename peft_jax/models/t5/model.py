"""The T5 family in Flax NNX: T5, T5 v1.1, FLAN-T5 and mT5.

Attribute names are the module names of Hugging Face transformers (`encoder.block.layer.0.SelfAttention.q.kernel`). The
blocks of a stack are stacked: every leaf below `block.layer` has a leading axis of the stack's depth, and a pass is one
`jax.lax.scan` over them. What the first block alone has, the bias of relative positions that all blocks add, is below
`block.0`.

The model is plain Flax and knows nothing of adapters or quantization. Its numbers are those of transformers'
`T5ForConditionalGeneration` with its default ("sdpa") attention; dropout is not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.core.ids import rows_at
from peft_jax.models.t5.blocks import (
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
)
from peft_jax.models.t5.config import T5Config
from peft_jax.models.t5.relative_attention import (
    KeysValues,
    Seen,
    T5Cache,
    linear,
    relative_buckets,
)


class Encoded(NamedTuple):
    """What the encoder returns.

    last_hidden_state is (batch, length, hidden). hidden_states, if asked for, are (layers + 1, batch, length,
    hidden): the embeddings, the output of each block but the last, and the output of the final norm.
    """

    last_hidden_state: jax.Array
    hidden_states: jax.Array | None = None


class Cross(NamedTuple):
    """What a decoder sees of the encoder.

    Either encoded, its output (batch, length, hidden), with a prefix (layers, batch or 1, n_virtual, heads, head_dim)
    of the keys and values of it; or these, ready, (layers, batch, kv_len, heads, head_dim), as from a cache. mask is
    (batch or 1, kv_len).
    """

    mask: jax.Array
    encoded: jax.Array | None = None
    prefix: KeysValues | None = None
    ready: KeysValues | None = None


class Decoded(NamedTuple):
    """What the decoder returns: logits (batch, length, vocab), hidden states as the encoder's, the filled cache."""

    logits: jax.Array
    hidden_states: jax.Array | None = None
    cache: T5Cache | None = None


class T5Blocks(nnx.Module):
    """The stacked blocks of a stack, `layer`, and the bias of relative positions that the first one brings, `0`."""

    def __init__(self, config: T5Config, name: str, dtype: Any, rngs: nnx.Rngs) -> None:
        crossing = [T5LayerCrossAttention] if name == "decoder" else []
        kinds = [T5LayerSelfAttention, *crossing, T5LayerFF]

        def make(key: jax.Array) -> Any:
            own = nnx.Rngs(key)
            return nnx.Dict({str(index): kind(config, dtype, own) for index, kind in enumerate(kinds)})

        self.layer = nnx.vmap(make)(jax.random.split(rngs.params(), config.depths[name]))
        init = nnx.initializers.normal(config.initializer_factor * config.hidden_size**-0.5)
        buckets, heads = config.relative_attention_num_buckets, config.num_attention_heads
        table = nnx.Embed(buckets, heads, embedding_init=init, param_dtype=dtype, rngs=rngs)
        attention = nnx.Dict(SelfAttention=nnx.Dict(relative_attention_bias=table))
        setattr(self, "0", nnx.Dict(layer=nnx.Dict({"0": attention})))

    def bias(self, buckets: jax.Array) -> jax.Array:
        """What all blocks add to the scores of keys in these buckets (length, kv_len): (1, heads, length, kv_len)."""
        table = getattr(self, "0")["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
        return jnp.transpose(table(buckets), (2, 0, 1))[None]


class T5Stack(nnx.Module):
    """Blocks and final norm, and an embedding where it is not shared."""

    def __init__(self, config: T5Config, name: str, dtype: Any, rngs: nnx.Rngs) -> None:
        if not config.share_embeddings:
            self.embed_tokens = embedding(config, dtype, rngs)
        self.depth = config.depths[name]
        self.block = T5Blocks(config, name, dtype, rngs)
        self.final_layer_norm = T5LayerNorm(config, dtype)

    def scan(
        self, step: Callable[..., Any], x: jax.Array, buffers: KeysValues | None, extras: Any, keep: bool, remat: bool
    ) -> tuple[jax.Array, jax.Array | None, KeysValues | None]:
        """Run all blocks by ``step(layer, x, buffers, index, extra) -> (x, buffers)``.

        extras are arrays of which each block has its part; keep asks for every block's input as well, remat for
        recomputing blocks in the backward.
        """
        graph, stacked = nnx.split(self.block.layer)

        def body(carry: Any, inputs: Any) -> Any:
            state, index, extra = inputs
            return step(nnx.merge(graph, state), *carry, index, extra), carry[0] if keep else None

        body = jax.checkpoint(body) if remat else body
        (x, buffers), inputs = jax.lax.scan(body, (x, buffers), (stacked, jnp.arange(self.depth), extras))
        x = self.final_layer_norm(x)
        return x, jnp.concatenate([inputs, x[None].astype(inputs.dtype)]) if keep else None, buffers


class T5(nnx.Module):
    """An encoder-decoder of the T5 family with its output head; its methods are called by `peft_jax.models.t5.forward`.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=8, num_hidden_layers=2,
        ...                   num_attention_heads=2)
        >>> model = T5(config, rngs=nnx.Rngs(0))
        >>> encoded = model.encode(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool), keep=False, remat=False)
        >>> encoded.last_hidden_state.shape
        (1, 3, 8)
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.shared = embedding(config, dtype, rngs)
        self.encoder = T5Stack(config, "encoder", dtype, rngs)
        self.decoder = T5Stack(config, "decoder", dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, 1.0, dtype, rngs)

    def embed(self, name: str, ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        """Inputs of a stack (batch, length, hidden), in the dtype of its residual stream."""
        stack = self.encoder if name == "encoder" else self.decoder
        table = self.shared if self.config.share_embeddings else stack.embed_tokens
        rows = table.embedding[...]
        x = rows_at(rows, jnp.asarray(ids)) if embeds is None else embeds.astype(rows.dtype)
        ff = stack.block.layer[str(len(stack.block.layer) - 1)]
        return x.astype(ff.DenseReluDense.wo.kernel[...].dtype)

    def encode(self, x: jax.Array, mask: jax.Array, *, keep: bool, remat: bool) -> Encoded:
        """Run the encoder on x (batch, length, hidden) with mask (batch or 1, length)."""
        slots = jnp.arange(x.shape[1])
        bias = self.encoder.block.bias(relative_buckets(self.config, slots, slots, causal=False))
        seen = Seen(bias, mask[:, None, None, :])

        def step(layer: Any, x: jax.Array, buffers: None, index: jax.Array, extra: None) -> Any:
            return layer["1"](layer["0"](x, seen, index, None, None)[0]), None

        return Encoded(*self.encoder.scan(step, x, None, None, keep, remat)[:2])

    def cross_keys_values(self, encoded: jax.Array, prefix: KeysValues | None) -> KeysValues:
        """Keys and values (layers, batch, kv_len, heads, head_dim) of the encoder's output for all blocks."""
        graph, stacked = nnx.split(self.decoder.block.layer["1"])

        def body(carry: None, inputs: Any) -> tuple[None, KeysValues]:
            state, own = inputs
            return carry, nnx.merge(graph, state).keys_values(encoded, own)

        return jax.lax.scan(body, None, (stacked, prefix))[1]

    def decode(
        self,
        x: jax.Array,
        mask: jax.Array,
        slot: jax.Array | int,
        buffers: KeysValues | None,
        prefix: KeysValues | None,
        cross: Cross,
        *,
        keep: bool,
        remat: bool,
    ) -> tuple[jax.Array, jax.Array | None, KeysValues | None]:
        """Run the decoder on x (batch, length, hidden).

        Args:
            x: Embeddings of the new positions.
            mask: (batch or 1, n_virtual + kv_len), what of prefix and positions exists; a query sees none that is
                later.
            slot: The first new position among the kv_len.
            buffers: The cache's keys and values.
            prefix: Keys and values (layers, batch or 1, n_virtual, heads, head_dim) in front of the positions' own.
            cross: The encoder's.
            keep: Whether to return the hidden states.
            remat: Whether the backward recomputes blocks.
        """
        virtual = 0 if prefix is None else prefix[0].shape[2]
        queries, keys = jnp.arange(x.shape[1]) + (virtual + slot), jnp.arange(mask.shape[1])
        bias = self.decoder.block.bias(relative_buckets(self.config, queries, keys, causal=True))
        causal = keys[None, :] <= queries[:, None]
        seen = Seen(bias, mask[:, None, None, :] & causal[None, None], slot)

        def step(layer: Any, x: jax.Array, buffers: KeysValues | None, index: jax.Array, extra: Any) -> Any:
            prefix, cross_prefix, ready = extra
            x, buffers = layer["0"](x, seen, index, buffers, prefix)
            kv = ready or layer["1"].keys_values(cross.encoded, cross_prefix)
            return layer["2"](layer["1"](x, kv, cross.mask[:, None, None, :])), buffers

        return self.decoder.scan(step, x, buffers, (prefix, cross.prefix, cross.ready), keep, remat)

    def logits(self, h: jax.Array) -> jax.Array:
        """Logits (batch, length, vocab) of the decoder's output."""
        h = h * self.config.hidden_size**-0.5 if self.config.scale_decoder_outputs else h
        return h @ self.shared.embedding[...].T if self.config.tie_word_embeddings else self.lm_head(h)


def embedding(config: T5Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """A table (vocab, hidden)."""
    init = nnx.initializers.normal(config.initializer_factor)
    return nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, param_dtype=dtype, rngs=rngs)
