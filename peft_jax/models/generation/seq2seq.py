"""Generation with encoder-decoders: the encoder runs once, and the decoder goes on from a start token."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapt import adapt
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.causal import (
    padding_mask,
    refuse_padding_at_the_end,
    run_programs,
    with_padding,
)
from peft_jax.models.generation.decode import (
    Decoder,
    Programs,
    Streamer,
    make_programs,
)
from peft_jax.models.generation.generation_config import Generation, resolve
from peft_jax.models.handles.prompted import Cached, apply_prompted, seen_before
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import Prompt, take_prompt


class Question(NamedTuple):
    """What the encoder is given, or has given, with its mask, and each row's task for a prompt that has several."""

    input_ids: jax.Array | None = None
    inputs_embeds: jax.Array | None = None
    encoder_outputs: jax.Array | None = None
    attention_mask: Any = None
    task_ids: jax.Array | None = None

    @property
    def given(self) -> jax.Array:
        """The inputs or outputs of the encoder (batch, length, ...).

        Raises:
            ValueError: if there is not one of them.
        """
        found = [one for one in (self.input_ids, self.inputs_embeds, self.encoder_outputs) if one is not None]
        if len(found) != 1:
            raise ValueError(f"Give one of input_ids, inputs_embeds and encoder_outputs, got {len(found)} of them.")
        return found[0]


def answer(
    config: Any,
    params: Any,
    question: Question,
    start: tuple[Any, Any],
    asked: Mapping[str, Any],
    found: Mapping[str, Any],
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """The decoder's ids (batch, length + n), which begin with ``start``: its ids and their mask, or None.

    The other arguments are those of `Seq2SeqLM.generate`.

    Raises:
        ValueError: if there is nothing to start with, or it ends in padding; also as `resolve`.
    """
    ids, mask = _begin(config, len(question.given), *start, found)
    wanted = resolve(
        asked,
        found,
        length=ids.shape[1],
        positions=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if question.attention_mask is not None:
        question = question._replace(attention_mask=jnp.asarray(question.attention_mask, bool))
    elif question.input_ids is not None:
        question = question._replace(attention_mask=padding_mask(question.input_ids, None, wanted))
    wanted = with_padding(wanted)
    return run_programs(programs(config, wanted), (params, question), ids, mask, wanted, key, streamer)


def _begin(config: Any, batch: int, ids: Any, mask: Any, found: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The decoder's first ids and their mask; the start token is put in front where no row begins with it."""
    told = found.get("decoder_start_token_id")
    first = config.decoder_start_token_id if told is None else told
    if first is None:
        raise ValueError("The model has no decoder_start_token_id. Set it in generation_config.json or in the config.")
    if ids is None and mask is not None:
        raise ValueError("decoder_attention_mask is for decoder_input_ids, which are not given. Leave it out.")
    column = jnp.full((batch, 1), first, jnp.int32)
    if ids is None:
        return column, jnp.ones_like(column, bool)
    if len(ids) != batch:
        raise ValueError(f"decoder_input_ids have {len(ids)} rows, but the encoder's inputs have {batch}.")
    mask = jnp.ones_like(ids, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != ids.shape:
        raise ValueError(f"decoder_attention_mask must be {ids.shape}, like decoder_input_ids, got {mask.shape}.")
    if bool(jnp.all(ids[:, 0] != first)):
        ids = jnp.concatenate([column.astype(ids.dtype), ids], axis=1)
        mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
    refuse_padding_at_the_end(mask, "decoder prompt")
    return ids, mask


@functools.lru_cache(maxsize=64)
def programs(config: ModelConfig, wanted: Generation) -> Programs:
    """The compiled programs of a generation, whose first argument is the parameters and a `Question`."""
    family = family_of(config)
    if family.encoder_decoder is None:
        raise ValueError(f"A {config.model_type} model is no encoder-decoder.")
    embed = adapt(partial(family.embed, config))
    encode, fill, decode = (adapt(partial(part, config)) for part in family.encoder_decoder)

    def decoder(given: tuple[Any, Question]) -> Decoder:
        params, prompt = take_prompt(given[0], given[1].task_ids)

        def apply(inputs: ForwardInputs) -> Any:
            return decode(params, dataclasses.replace(inputs, position_ids=None))  # they are the cache's slots

        model = Cached(apply, partial(embed, params), Prompt(prefix=prompt.prefix))
        return Decoder(model, wanted.eos_token_ids, wanted.pad_token_id or 0, wanted.sampling)

    def cache(given: tuple[Any, Question], batch: int, positions: int) -> Any:
        params, prompt = take_prompt(given[0], given[1].task_ids)
        encoded, mask = given[1].encoder_outputs, given[1].attention_mask
        if encoded is None:
            question = given[1]
            inputs = ForwardInputs(
                input_ids=question.input_ids, inputs_embeds=question.inputs_embeds, attention_mask=mask
            )
            tokens = Prompt(tokens=prompt.tokens)
            encoded = apply_prompted(partial(encode, params), partial(embed, params), tokens, inputs).last_hidden_state
        elif prompt.tokens is not None:
            raise ValueError("encoder_outputs leave the prompt no place among the inputs. Give input_ids.")
        if mask is not None and prompt.tokens is not None:
            mask = seen_before(mask, prompt.tokens.shape[1])
        room = positions + (0 if prompt.prefix is None else prompt.prefix[0].shape[2])
        return fill(params, encoded, room, attention_mask=mask)

    return make_programs(decoder, cache, wanted.max_new_tokens)
