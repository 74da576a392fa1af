"""Generation with causal language models."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.core.articles import article
from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.decode import (
    Cache,
    Decoder,
    Programs,
    Streamer,
    is_widened,
    make_programs,
    stream,
)
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.generation.generation_config import Generation, resolve
from peft_jax.models.handles.prompted import Cached
from peft_jax.models.handles.two_passes import in_two_passes
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import TwoCaches
from peft_jax.models.registry import family_of
from peft_jax.models.shadow_backbone import apply_beside, cache_beside
from peft_jax.prompts.base import take_prompt, virtual_slots
from peft_jax.prompts.xlora import has_router


def continue_prompts(
    config: ModelConfig,
    params: tuple[Any, jax.Array | None],
    ids: jax.Array,
    attention_mask: Any,
    options: GenerateOptions,
    generation_config: Mapping[str, Any],
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """Generate what follows prompts.

    Args:
        config: The architecture.
        params: The parameters, and the task of each row for an adapter that has several.
        ids: Prompts (batch, length).
        attention_mask: As in `CausalLM.generate`, like the arguments after it.
        options: The options that the call gives.
        generation_config: Contents of generation_config.json.
        key: Random key.
        streamer: Receiver of the tokens.

    Returns:
        Token ids (batch, length + n).

    Raises:
        ValueError: If a prompt ends in padding; also as `resolve`.
    """
    generation = resolve(
        options,
        generation_config,
        length=ids.shape[1] + virtual_slots(params[0]),
        positions=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    mask = padding_mask(ids, attention_mask, generation)
    refuse_padding_at_the_end(mask, "prompt")
    generation = with_padding(generation)
    run = programs(config, generation, widened=is_widened(params))
    return run_programs(run, params, ids, mask, generation, key, streamer)


def padding_mask(ids: jax.Array, attention_mask: Any, generation: Generation) -> jax.Array:
    """The mask of ids (batch, length): the given one, else 0 on the ids of padding, unless they end a row too."""
    if attention_mask is not None:
        return jnp.asarray(attention_mask, bool)
    pad = generation.pad_token_id
    if pad is None or pad in generation.eos_token_ids:
        return jnp.ones_like(ids, bool)
    return ids != pad


def refuse_padding_at_the_end(mask: jax.Array, kind: str) -> None:
    """Raise ValueError if a row of a mask ends in 0."""
    if not np.asarray(mask)[:, -1].all():
        raise ValueError(f"A {kind} ends in padding. Pad {kind}s on the left (tokenizer.padding_side = 'left').")


def with_padding(generation: Generation) -> Generation:
    """The generation with a token for finished rows: without a token for padding, the first that ends a row."""
    if generation.pad_token_id is not None:
        return generation
    fillers = (*generation.eos_token_ids, 0)
    return generation._replace(pad_token_id=fillers[0])


def run_programs(
    run: Programs,
    params: PyTree,
    ids: jax.Array,
    mask: jax.Array,
    generation: Generation,
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """Run a generation from ids (batch, length) to (batch, length + n), with a streamer if there is one."""
    if key is None:
        key = jax.random.key(0)
    if streamer is None:
        tokens, count = run.whole(params, ids, mask, key)
    else:
        tokens, count = stream(run, params, ids, mask, key, generation.max_new_tokens, streamer)
    return tokens[:, : ids.shape[1] + int(count)]


@functools.lru_cache(maxsize=64)
def programs(config: ModelConfig, generation: Generation, *, widened: bool) -> Programs:
    """The compiled programs of a generation, the same for all parameters and prompts."""
    family = family_of(config)
    if family.init_cache is None:
        raise ValueError(f"{article(config.model_type, first=True)} model does not generate.")
    run, embed = adapt(partial(apply_beside, family, config)), adapt(partial(family.embed, config))

    def run_alone(tree: PyTree, inputs: ForwardInputs) -> Any:
        return run(tree, None, inputs)

    def decoder(params: PyTree) -> Decoder:
        rest, prompt = take_prompt(*params)

        def apply(inputs: ForwardInputs) -> Any:
            inputs = dataclasses.replace(inputs, logits_to_keep=1)
            if prompt.router is not None:
                return in_two_passes(config, run_alone, rest, prompt.router, inputs)
            return run(rest, prompt.shadow, inputs)

        model = Cached(apply, partial(embed, rest), prompt)
        # After virtual tokens transformers finds the cache longer than the ids, and does not compute it again.
        renewed_at = config.renewed_at if model.slots == 0 else None
        pad = generation.pad_token_id or 0
        return Decoder(model, generation.eos_token_ids, pad, generation.sampling, renewed_at)

    def cache(params: PyTree, batch: int, positions: int) -> Cache:
        dtype = family.embedding_table(config, params[0]).dtype
        slots = positions + virtual_slots(params[0])
        empty: Cache = cache_beside(family, config, params[0], batch, slots, dtype)
        return TwoCaches(empty, empty) if has_router(params[0]) else empty

    return make_programs(decoder, cache, generation.max_new_tokens, widened=widened)
