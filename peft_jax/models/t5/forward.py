"""T5 as pure functions of its parameters: the encoder, the decoder with and without a cache, and both."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.models.modules import functional
from peft_jax.models.modules.positions import make_cache, seen_slots
from peft_jax.models.t5.config import T5Config
from peft_jax.models.t5.model import (
    T5,
    Cross,
    Decoded,
    Encoded,
)
from peft_jax.models.t5.relative_attention import KeysValues, T5Cache, behind


class Seq2SeqOutput(NamedTuple):
    """What `apply` returns: logits (batch, length, vocab), hidden states where asked for, and the encoder's."""

    logits: jax.Array
    decoder_hidden_states: jax.Array | None
    encoder_last_hidden_state: jax.Array
    encoder_hidden_states: jax.Array | None


def init_params(config: T5Config, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Make random parameters, normal matrices with the deviations of transformers' T5.

    Returns:
        A nested dict of arrays with the names of the Hugging Face modules. Kernels are (in, out), embeddings
        (vocab, hidden); everything below `block.layer` has a leading axis of the stack's depth.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=2,
        ...                   num_attention_heads=3)
        >>> params = init_params(config, jax.random.key(0))
        >>> params["encoder"]["block"]["layer"]["0"]["SelfAttention"]["q"]["kernel"].shape
        (2, 8, 12)
    """
    return functional.init_params(T5, config, key, dtype)


def param_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Map each parameter's dotted path to its shape, without making the parameters.

    Example:
        >>> param_shapes(T5Config())["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.embedding"]
        (32, 8)
    """
    return functional.param_shapes(T5, config)


def encode(
    config: T5Config,
    params: dict[str, Any],
    input_ids: jax.Array | None = None,
    *,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    output_hidden_states: bool = False,
    remat: bool = False,
) -> Encoded:
    """Run the encoder.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays as from `init_params`.
        input_ids: Token ids (batch, length).
        inputs_embeds: Instead of input_ids, embeddings (batch, length, hidden).
        attention_mask: 0/1 (batch, length).
        output_hidden_states: Also return the hidden states.
        remat: Keep only each block's input for the backward pass and compute the rest again.

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.
    """
    model = functional.bind(T5, config, params)
    _one_of("input_ids", input_ids, inputs_embeds)
    x = model.embed("encoder", input_ids, inputs_embeds)
    mask = _mask("attention_mask", attention_mask, *x.shape[:2])
    return model.encode(x, mask, keep=output_hidden_states, remat=remat)


def decode(
    config: T5Config,
    params: dict[str, Any],
    input_ids: jax.Array | None = None,
    *,
    encoded: jax.Array | None = None,
    encoder_attention_mask: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    cache: T5Cache | None = None,
    prefix: KeysValues | None = None,
    cross_prefix: KeysValues | None = None,
    output_hidden_states: bool = False,
    remat: bool = False,
) -> Decoded:
    """Run the decoder, on the encoder's output or on a cache that holds the keys and values of it.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays as from `init_params`.
        input_ids: Token ids (batch, length).
        encoded: The encoder's output (batch, encoder's length, hidden).
        encoder_attention_mask: 0/1 (batch, encoder's length).
        inputs_embeds: Instead of input_ids, embeddings (batch, length, hidden).
        attention_mask: 0/1 (batch, length), or with a cache (batch, index + length) up to (batch, max_len).
        cache: As from `init_cache`, in place of encoded, its mask and the prefixes. The caller sees to it that index +
            length does not exceed max_len.
        prefix: Keys and values (layers, batch or 1, n_virtual, heads, head_dim) of virtual tokens before the first
            position, which self-attention sees; positions count on from them. In a cache they are the first
            positions (`peft_jax.models.modules.positions.prefilled`).
        cross_prefix: The same before the encoder's output, for the attention to it.
        output_hidden_states: Also return the hidden states.
        remat: Keep only each block's input for the backward pass and compute the rest again.

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.
    """
    model = functional.bind(T5, config, params)
    _one_of("decoder_input_ids", input_ids, inputs_embeds)
    x = model.embed("decoder", input_ids, inputs_embeds)
    (batch, length), slot = x.shape[:2], jnp.int32(0)
    buffers: KeysValues | None = None
    if cache is not None:
        if any(one is not None for one in (encoded, encoder_attention_mask, prefix, cross_prefix)):
            raise ValueError("A cache holds encoded, its mask and the prefixes. Leave them out here.")
        buffers, slot, kv_len = (cache.keys, cache.values), cache.index, cache.keys.shape[2]
        mask = jnp.ones((1, kv_len), bool)
        mask = mask if attention_mask is None else seen_slots(attention_mask, batch, length, kv_len, cached=True)
        cross = Cross(cache.cross_mask, ready=(cache.cross_keys, cache.cross_values))
    elif encoded is not None:
        mask = _mask("decoder_attention_mask", attention_mask, batch, length)
        cross = Cross(_cross_mask(encoded, encoder_attention_mask, cross_prefix), encoded, cross_prefix)
    else:
        raise ValueError("decode needs encoded= (the output of encode) or cache= (of init_cache), got neither.")
    static = {"keep": output_hidden_states, "remat": remat}
    h, states, buffers = model.decode(x, behind(prefix, mask), slot, buffers, prefix, cross, **static)
    if cache is not None and buffers is not None:
        cache = cache._replace(keys=buffers[0], values=buffers[1], index=cache.index + length)
    return Decoded(model.logits(h), states, cache)


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
        params: A nested dict of arrays as from `init_params`.
        encoded: The encoder's output (batch, length, hidden).
        max_len: How many positions there is room for.
        attention_mask: 0/1 (batch, length), of the encoder's.
        cross_prefix: As in `decode`.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=2,
        ...                   num_attention_heads=3)
        >>> params = init_params(config, jax.random.key(0))
        >>> cache = init_cache(config, params, jnp.ones((5, 7, 8)), max_len=9)
        >>> cache.keys.shape, cache.cross_keys.shape
        ((2, 5, 9, 3, 4), (2, 5, 7, 3, 4))
    """
    cross_keys, cross_values = functional.bind(T5, config, params).cross_keys_values(encoded, cross_prefix)
    sizes = config.depths["decoder"], len(encoded), max_len, config.num_attention_heads, config.head_dim
    keys, values, index = make_cache(*sizes, cross_keys.dtype)
    mask = _cross_mask(encoded, attention_mask, cross_prefix)
    return T5Cache(keys, values, cross_keys, cross_values, mask, index)


def apply(
    config: T5Config,
    params: dict[str, Any],
    input_ids: jax.Array | None = None,
    *,
    attention_mask: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    encoder_outputs: jax.Array | None = None,
    decoder_input_ids: jax.Array | None = None,
    decoder_attention_mask: jax.Array | None = None,
    decoder_inputs_embeds: jax.Array | None = None,
    prefix: KeysValues | None = None,
    cross_prefix: KeysValues | None = None,
    output_hidden_states: bool = False,
    remat: bool = False,
) -> Seq2SeqOutput:
    """Run encoder and decoder.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays as from `init_params`.
        input_ids: The encoder's token ids (batch, length).
        attention_mask: 0/1 (batch, length), for the encoder and for what the decoder sees of it.
        inputs_embeds: Instead of input_ids, embeddings (batch, length, hidden).
        encoder_outputs: Instead of either, the encoder's output (batch, length, hidden).
        decoder_input_ids: The decoder's token ids (batch, decoder's length).
        decoder_attention_mask: 0/1 (batch, decoder's length).
        decoder_inputs_embeds: Instead of decoder_input_ids, embeddings (batch, decoder's length, hidden).
        prefix: As in `decode`.
        cross_prefix: As in `decode`.
        output_hidden_states: Also return the hidden states.
        remat: Keep only each block's input for the backward pass and compute the rest again.

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.

    Example:
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=2,
        ...                   num_attention_heads=3)
        >>> params = init_params(config, jax.random.key(0))
        >>> apply(config, params, jnp.array([[5, 6, 7, 1]]), decoder_input_ids=jnp.array([[0, 3]])).logits.shape
        (1, 2, 16)
    """
    if encoder_outputs is None:
        encoded = encode(
            config,
            params,
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            remat=remat,
        )
    elif input_ids is None and inputs_embeds is None:
        encoded = Encoded(encoder_outputs)
    else:
        raise ValueError("encoder_outputs stand for the encoder's inputs. Leave input_ids and inputs_embeds out.")
    out = decode(
        config,
        params,
        decoder_input_ids,
        encoded=encoded.last_hidden_state,
        encoder_attention_mask=attention_mask,
        inputs_embeds=decoder_inputs_embeds,
        attention_mask=decoder_attention_mask,
        prefix=prefix,
        cross_prefix=cross_prefix,
        output_hidden_states=output_hidden_states,
        remat=remat,
    )
    return Seq2SeqOutput(out.logits, out.hidden_states, encoded.last_hidden_state, encoded.hidden_states)


def _one_of(name: str, ids: jax.Array | None, embeds: jax.Array | None) -> None:
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        other = name.replace("input_ids", "inputs_embeds")
        raise ValueError(f"A call needs {name} or {other}, one of them, got {found}.")


def _mask(name: str, mask: jax.Array | None, batch: int, length: int) -> jax.Array:
    """A 0/1 mask as bool (batch, length); (1, length) without one."""
    if mask is None:
        return jnp.ones((1, length), bool)
    if mask.shape != (batch, length):
        raise ValueError(f"{name} must be {(batch, length)}, like the inputs, got shape {mask.shape}.")
    return mask.astype(bool)


def _cross_mask(encoded: jax.Array, mask: jax.Array | None, prefix: KeysValues | None) -> jax.Array:
    return behind(prefix, _mask("attention_mask", mask, *encoded.shape[:2]))
