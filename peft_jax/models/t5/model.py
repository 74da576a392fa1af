"""The T5 family in Flax NNX: T5, T5 v1.1, FLAN-T5 and mT5.

Attribute names are the module names of Hugging Face transformers (`encoder.block.layer.0.SelfAttention.q.kernel`). The
blocks of a stack are stacked: every leaf below `block.layer` has a leading axis of the stack's depth, and a pass is one
`jax.lax.scan` over them. What the first block alone has, the bias of relative positions that all blocks add, is below
`block.0`.

The model is plain Flax and knows nothing of adapters or quantization. Its numbers are those of transformers'
`T5ForConditionalGeneration` with its default ("sdpa") attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.ids import rows_at
from peft_jax.models.modules import functional
from peft_jax.models.modules.base_dropout import Site, dropped, key_of
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import make_cache
from peft_jax.models.modules.layer_scan import stacked
from peft_jax.models.modules.positions import seen_slots
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
    behind,
    linear,
    relative_buckets,
)

OF_ENCODER = ("input_ids", "inputs_embeds", "attention_mask", "dropout_key", "output_hidden_states", "remat")
OF_DECODER = (*OF_ENCODER, "cache", "prefix", "cross_prefix")


class Encoded(NamedTuple):
    """Output of the encoder.

    last_hidden_state is (batch, length, hidden). hidden_states, if asked for, are (layers + 1, batch, length,
    hidden): the embeddings, the output of each block but the last, and the output of the final norm.
    """

    last_hidden_state: jax.Array
    hidden_states: jax.Array | None = None


class Cross(NamedTuple):
    """The encoder's part in the decoder's attention.

    Either encoded, its output (batch, length, hidden), with a prefix (layers, batch or 1, n_virtual, heads, head_dim)
    of the keys and values of it; or these, ready, (layers, batch, kv_len, heads, head_dim), as from a cache. mask is
    (batch or 1, kv_len).
    """

    mask: jax.Array
    encoded: jax.Array | None = None
    prefix: KeysValues | None = None
    ready: KeysValues | None = None


class Decoded(NamedTuple):
    """Output of the decoder: logits (batch, length, vocab), hidden states as the encoder's, the filled cache."""

    logits: jax.Array
    hidden_states: jax.Array | None = None
    cache: T5Cache | None = None


class Seq2SeqOutput(NamedTuple):
    """Output of a T5: logits (batch, length, vocab), hidden states where asked for, and the encoder's."""

    logits: jax.Array
    decoder_hidden_states: jax.Array | None
    encoder_last_hidden_state: jax.Array
    encoder_hidden_states: jax.Array | None


class T5Blocks(nnx.Module):
    """The stacked blocks of a stack, `layer`, and the bias of relative positions that the first one brings, `0`."""

    def __init__(self, config: T5Config, name: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        crossing = [T5LayerCrossAttention] if name == "decoder" else []
        kinds = [T5LayerSelfAttention, *crossing, T5LayerFF]

        def make(own: nnx.Rngs) -> Any:
            return nnx.Dict({str(index): kind(config, dtype, own) for index, kind in enumerate(kinds)})

        self.layer = stacked(make, config.depths[name], rngs)
        init = nnx.initializers.normal(config.initializer_factor * config.hidden_size**-0.5)
        buckets, heads = config.relative_attention_num_buckets, config.num_attention_heads
        table = nnx.Embed(buckets, heads, embedding_init=init, param_dtype=dtype, rngs=rngs)
        attention = nnx.Dict(SelfAttention=nnx.Dict(relative_attention_bias=table))
        setattr(self, "0", nnx.Dict(layer=nnx.Dict({"0": attention})))

    def bias(self, buckets: jax.Array) -> jax.Array:
        """The bias that all blocks add to scores, (1, heads, length, kv_len), for buckets of keys (length, kv_len)."""
        table = getattr(self, "0")["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
        return jnp.transpose(table(buckets), (2, 0, 1))[None]


class T5Stack(nnx.Module):
    """Blocks and final norm, and an embedding where it is not shared."""

    def __init__(self, config: T5Config, name: str, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        if not config.share_embeddings:
            self.embed_tokens = embedding(config, dtype, rngs)
        self.depth, self.rates = config.depths[name], config.rates
        self.block = T5Blocks(config, name, dtype, rngs)
        self.final_layer_norm = T5LayerNorm(config, dtype)

    def scan(
        self,
        step: Callable[..., Any],
        x: jax.Array,
        buffers: KeysValues | None,
        extras: Any,
        keep: bool,
        remat: bool,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, KeysValues | None]:
        """Run all blocks by ``step(layer, x, buffers, index, extra, key) -> (x, buffers)``.

        extras are arrays of which each block has its part; keep asks for every block's input as well, remat for
        recomputing blocks in the backward; key is of the stack's dropout.
        """
        graph, stacked = nnx.split(self.block.layer)
        layers = key_of(key, Site.LAYERS)
        x = dropped(x, key, self.rates.embedding, Site.EMBEDDING)

        def body(carry: Any, inputs: Any) -> Any:
            state, index, extra = inputs
            own = key_of(layers, index)
            return step(nnx.merge(graph, state), *carry, index, extra, own), carry[0] if keep else None

        body = jax.checkpoint(body) if remat else body
        (x, buffers), inputs = jax.lax.scan(body, (x, buffers), (stacked, jnp.arange(self.depth), extras))
        x = dropped(self.final_layer_norm(x), key, self.rates.final, Site.FINAL)
        return x, jnp.concatenate([inputs, x[None].astype(inputs.dtype)]) if keep else None, buffers


class T5(nnx.Module):
    """An encoder-decoder of the T5 family with its output head.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=8, num_hidden_layers=2,
        ...                   num_attention_heads=2)
        >>> model = T5(config, rngs=nnx.Rngs(0))
        >>> encoded = model.encode(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool), keep=False, remat=False)
        >>> encoded.last_hidden_state.shape
        (1, 3, 8)
    """

    takes = frozenset(
        (
            "input_ids",
            "inputs_embeds",
            "attention_mask",
            "encoder_outputs",
            "decoder_input_ids",
            "decoder_inputs_embeds",
            "decoder_attention_mask",
            "prefix",
            "cross_prefix",
            "dropout_key",
            "output_hidden_states",
            "remat",
        )
    )

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.shared = embedding(config, dtype, rngs)
        self.encoder = T5Stack(config, "encoder", dtype, rngs)
        self.decoder = T5Stack(config, "decoder", dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, 1.0, dtype, rngs)

    def __call__(self, inputs: ForwardInputs) -> Seq2SeqOutput:
        """Run encoder and decoder; the attention mask is also for what the decoder sees of the encoder's output."""
        if inputs.encoder_outputs is None:
            encoded = self.read(inputs)
        elif inputs.input_ids is None and inputs.inputs_embeds is None:
            encoded = Encoded(inputs.encoder_outputs)
        else:
            raise ValueError("encoder_outputs stand for the encoder's inputs. Leave input_ids and inputs_embeds out.")
        of_decoder = ForwardInputs(
            input_ids=inputs.decoder_input_ids,
            inputs_embeds=inputs.decoder_inputs_embeds,
            attention_mask=inputs.decoder_attention_mask,
            prefix=inputs.prefix,
            cross_prefix=inputs.cross_prefix,
            dropout_key=inputs.dropout_key,
            output_hidden_states=inputs.output_hidden_states,
            remat=inputs.remat,
        )
        out = self.write(of_decoder, encoded.last_hidden_state, inputs.attention_mask)
        return Seq2SeqOutput(out.logits, out.hidden_states, encoded.last_hidden_state, encoded.hidden_states)

    def read(self, inputs: ForwardInputs) -> Encoded:
        """Run the encoder on its inputs."""
        x = self.embed("encoder", inputs.input_ids, inputs.inputs_embeds)
        mask = as_mask("attention_mask", inputs.attention_mask, *x.shape[:2])
        key = key_of(inputs.dropout_key, Site.ENCODER)
        return self.encode(x, mask, keep=inputs.output_hidden_states, remat=inputs.remat, key=key)

    def write(
        self, inputs: ForwardInputs, encoded: jax.Array | None, encoder_attention_mask: jax.Array | None
    ) -> Decoded:
        """Run the decoder on its inputs, as `decode` says."""
        cache: T5Cache | None = inputs.cache
        prefix = inputs.prefix
        x = self.embed("decoder", inputs.input_ids, inputs.inputs_embeds)
        (batch, length), slot = x.shape[:2], jnp.int32(0)
        buffers: KeysValues | None = None
        if cache is not None:
            if any(one is not None for one in (encoded, encoder_attention_mask, prefix, inputs.cross_prefix)):
                raise ValueError("A cache holds encoded, its mask and the prefixes. Leave them out here.")
            buffers, slot, kv_len = (cache.keys, cache.values), cache.index, cache.keys.shape[2]
            mask = jnp.ones((1, kv_len), bool)
            if inputs.attention_mask is not None:
                mask = seen_slots(inputs.attention_mask, batch, length, kv_len, cached=True)
            cross = Cross(cache.cross_mask, ready=(cache.cross_keys, cache.cross_values))
        elif encoded is not None:
            mask = as_mask("decoder_attention_mask", inputs.attention_mask, batch, length)
            seen = cross_mask(encoded, encoder_attention_mask, inputs.cross_prefix)
            cross = Cross(seen, encoded, inputs.cross_prefix)
        else:
            raise ValueError("decode needs encoded= (the output of encode) or cache= (of init_cache), got neither.")
        asked: dict[str, Any] = {"keep": inputs.output_hidden_states, "remat": inputs.remat}
        asked["key"] = key_of(inputs.dropout_key, Site.DECODER)
        h, states, buffers = self.decode(x, behind(prefix, mask), slot, buffers, prefix, cross, **asked)
        if cache is not None and buffers is not None:
            cache = cache._replace(keys=buffers[0], values=buffers[1], index=cache.index + length)
        return Decoded(self.logits(h), states, cache)

    def embed(self, name: str, ids: jax.Array | None, embeds: jax.Array | None) -> jax.Array:
        """Inputs of a stack (batch, length, hidden), in the dtype of its residual stream.

        Raises:
            ValueError: None or both are given.
        """
        if (ids is None) == (embeds is None):
            found, of = "neither" if ids is None else "both", "decoder_" if name == "decoder" else ""
            raise ValueError(f"A call needs {of}input_ids or {of}inputs_embeds, one of them, got {found}.")
        stack = self.encoder if name == "encoder" else self.decoder
        table = self.shared if self.config.share_embeddings else stack.embed_tokens
        rows = table.embedding[...]
        x = rows_at(rows, jnp.asarray(ids)) if embeds is None else embeds.astype(rows.dtype)
        ff = stack.block.layer[str(len(stack.block.layer) - 1)]
        return x.astype(ff.DenseReluDense.wo.kernel[...].dtype)

    def encode(
        self, x: jax.Array, mask: jax.Array, *, keep: bool, remat: bool, key: jax.Array | None = None
    ) -> Encoded:
        """Run the encoder on x (batch, length, hidden) with mask (batch or 1, length); key is of its dropout."""
        slots = jnp.arange(x.shape[1])
        bias = self.encoder.block.bias(relative_buckets(self.config, slots, slots, causal=False))
        seen = Seen(bias, mask[:, None, None, :])

        def step(layer: Any, x: jax.Array, buffers: None, index: jax.Array, extra: None, key: Any) -> Any:
            return layer["1"](layer["0"](x, seen, index, None, None, key)[0], key), None

        return Encoded(*self.encoder.scan(step, x, None, None, keep, remat, key)[:2])

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
        key: jax.Array | None = None,
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
            key: The key of its dropout.
        """
        virtual = 0 if prefix is None else prefix[0].shape[2]
        queries, keys = jnp.arange(x.shape[1]) + (virtual + slot), jnp.arange(mask.shape[1])
        bias = self.decoder.block.bias(relative_buckets(self.config, queries, keys, causal=True))
        causal = keys[None, :] <= queries[:, None]
        seen = Seen(bias, mask[:, None, None, :] & causal[None, None], slot)

        def step(layer: Any, x: jax.Array, buffers: KeysValues | None, index: jax.Array, extra: Any, key: Any) -> Any:
            prefix, cross_prefix, ready = extra
            x, buffers = layer["0"](x, seen, index, buffers, prefix, key)
            kv = ready or layer["1"].keys_values(cross.encoded, cross_prefix)
            return layer["2"](layer["1"](x, kv, cross.mask[:, None, None, :], key), key), buffers

        return self.decoder.scan(step, x, buffers, (prefix, cross.prefix, cross.ready), keep, remat, key)

    def logits(self, h: jax.Array) -> jax.Array:
        """Logits (batch, length, vocab) of the decoder's output."""
        h = h * self.config.hidden_size**-0.5 if self.config.scale_decoder_outputs else h
        return h @ self.shared.embedding[...].T if self.config.tie_word_embeddings else self.lm_head(h)


def embedding(config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    """A table (vocab, hidden)."""
    init = nnx.initializers.normal(config.initializer_factor)
    return nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, param_dtype=dtype, rngs=rngs)


def encode(config: T5Config, params: Mapping[str, Any], inputs: ForwardInputs) -> Encoded:
    """Run the encoder.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays by Hugging Face module names.
        inputs: The encoder's.

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.
    """
    inputs.check(OF_ENCODER, "an encoder")
    encoded: Encoded = functional.bind(T5, config, params).read(inputs)
    return encoded


def decode(
    config: T5Config,
    params: Mapping[str, Any],
    inputs: ForwardInputs,
    *,
    encoded: jax.Array | None = None,
    encoder_attention_mask: jax.Array | None = None,
) -> Decoded:
    """Run the decoder, on the encoder's output or on a cache that holds the keys and values of it.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays by Hugging Face module names.
        inputs: The decoder's. The cache is one of `init_cache`, in place of encoded, its mask and the prefixes. In a
            cache a prefix takes the first positions (`peft_jax.models.modules.kv_cache.prefilled`).
        encoded: The encoder's output (batch, encoder's length, hidden).
        encoder_attention_mask: 0/1 (batch, encoder's length).

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.
    """
    inputs.check(OF_DECODER, "a decoder")
    decoded: Decoded = functional.bind(T5, config, params).write(inputs, encoded, encoder_attention_mask)
    return decoded


def init_cache(
    config: T5Config,
    params: dict[str, Any],
    encoded: jax.Array,
    max_len: int,
    *,
    attention_mask: jax.Array | None = None,
    cross_prefix: KeysValues | None = None,
) -> T5Cache:
    """Make a cache for max_len positions of the decoder, with the keys and values of the encoder's output.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays by Hugging Face module names.
        encoded: The encoder's output (batch, length, hidden).
        max_len: How many positions there is room for.
        attention_mask: 0/1 (batch, length), of the encoder's.
        cross_prefix: As in `decode`.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=2,
        ...                   num_attention_heads=3)
        >>> params = functional.init_params(T5, config, jax.random.key(0))
        >>> cache = init_cache(config, params, jnp.ones((5, 7, 8)), max_len=9)
        >>> cache.keys.shape, cache.cross_keys.shape
        ((2, 5, 9, 3, 4), (2, 5, 7, 3, 4))
    """
    model = functional.bind(T5, config, params)
    cross_keys, cross_values = model.cross_keys_values(encoded, cross_prefix)
    sizes = config.depths["decoder"], len(encoded), max_len, config.num_attention_heads, config.head_dim
    keys, values, index = make_cache(*sizes, cross_keys.dtype)
    mask = cross_mask(encoded, attention_mask, cross_prefix)
    return T5Cache(keys, values, cross_keys, cross_values, mask, index)


def as_mask(name: str, mask: jax.Array | None, batch: int, length: int) -> jax.Array:
    """A 0/1 mask as bool (batch, length); (1, length) without one."""
    if mask is None:
        return jnp.ones((1, length), bool)
    if mask.shape != (batch, length):
        raise ValueError(f"{name} must be {(batch, length)}, like the inputs, got shape {mask.shape}.")
    return mask.astype(bool)


def cross_mask(encoded: jax.Array, mask: jax.Array | None, prefix: KeysValues | None) -> jax.Array:
    """The mask of the encoder's output (batch, length, hidden), with a prefix of it in front."""
    return behind(prefix, as_mask("attention_mask", mask, *encoded.shape[:2]))
