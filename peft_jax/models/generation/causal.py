"""Generation with causal language models: what was asked and what the checkpoint says, made a compiled program."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.decode import (
    Decoder,
    Programs,
    Streamer,
    make_programs,
    stream,
)
from peft_jax.models.generation.generation_config import Generation, resolve
from peft_jax.models.handles.prompted import Cached
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import take_prompt, virtual_slots


def continue_prompts(
    config: ModelConfig,
    params: tuple[Any, jax.Array | None],
    ids: jax.Array,
    attention_mask: Any,
    asked: Mapping[str, Any],
    found: Mapping[str, Any],
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """Prompts ``ids`` with their continuations; the arguments are those of `CausalLM.generate`.

    ``params`` has the task of each row beside the parameters.

    Raises:
        ValueError: If a prompt ends in padding; also as `resolve`.
    """
    wanted = resolve(
        asked,
        found,
        length=ids.shape[1] + virtual_slots(params[0]),
        positions=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    mask = padding_mask(ids, attention_mask, wanted)
    refuse_padding_at_the_end(mask, "prompt")
    wanted = with_padding(wanted)
    return run_programs(programs(config, wanted), params, ids, mask, wanted, key, streamer)


def padding_mask(ids: jax.Array, attention_mask: Any, wanted: Generation) -> jax.Array:
    """The mask of ids (batch, length) as told, else by the id of padding, unless that ends a text too."""
    if attention_mask is not None:
        return jnp.asarray(attention_mask, bool)
    pad = wanted.pad_token_id
    return jnp.ones_like(ids, bool) if pad is None or pad in wanted.eos_token_ids else ids != pad


def refuse_padding_at_the_end(mask: jax.Array, what: str) -> None:
    """Raise ValueError if a row of a mask ends in 0."""
    if not np.asarray(mask)[:, -1].all():
        raise ValueError(f"A {what} ends in padding. Pad {what}s on the left (tokenizer.padding_side = 'left').")


def with_padding(wanted: Generation) -> Generation:
    """A generation whose finished rows go on with some token: the first that ends a text, where none is told."""
    return wanted if wanted.pad_token_id is not None else wanted._replace(pad_token_id=(*wanted.eos_token_ids, 0)[0])


def run_programs(
    run: Programs,
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    wanted: Generation,
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """Ids (batch, length) with their continuations (batch, length + n), handed to a streamer on the way."""
    arguments = (params, ids, mask, jax.random.key(0) if key is None else key)
    if streamer is None:
        tokens, count = run.whole(*arguments)
    else:
        tokens, count = stream(run, *arguments, wanted.max_new_tokens, streamer)
    return tokens[:, : ids.shape[1] + int(count)]


@functools.lru_cache(maxsize=64)
def programs(config: ModelConfig, wanted: Generation) -> Programs:
    """The compiled programs of a generation, the same for all parameters and prompts."""
    family = family_of(config)
    make_cache = family.init_cache
    if make_cache is None:
        raise ValueError(f"A {config.model_type} model does not generate.")
    run, embed = adapt(partial(family.apply, config)), adapt(partial(family.embed, config))

    def decoder(params: Any) -> Decoder:
        rest, prompt = take_prompt(*params)

        def apply(inputs: ForwardInputs) -> Any:
            return run(rest, dataclasses.replace(inputs, logits_to_keep=1))

        model = Cached(apply, partial(embed, rest), prompt)
        return Decoder(model, wanted.eos_token_ids, wanted.pad_token_id or 0, wanted.sampling)

    def cache(params: Any, batch: int, positions: int) -> KVCache:
        dtype = family.embedding_table(config, params[0]).dtype
        empty: KVCache = make_cache(config, batch, positions + virtual_slots(params[0]), dtype)
        return empty

    return make_programs(decoder, cache, wanted.max_new_tokens)
