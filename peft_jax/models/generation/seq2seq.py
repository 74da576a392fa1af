"""Generation with encoder-decoders: the encoder runs once, and the decoder continues a start token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapt import adapt
from peft_jax.core.articles import article
from peft_jax.core.pytree import PyTree
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
    is_widened,
    make_programs,
)
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.generation.generation_config import Generation, resolve
from peft_jax.models.handles.prompted import Cached, apply_prompted, seen_before
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import Prompt, take_prompt


class Question(NamedTuple):
    """The inputs of the encoder, or its outputs, with their mask, and the task of each row, where there are several."""

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
        arrays = [array for array in (self.input_ids, self.inputs_embeds, self.encoder_outputs) if array is not None]
        if len(arrays) != 1:
            raise ValueError(f"Give one of input_ids, inputs_embeds and encoder_outputs, got {len(arrays)} of them.")
        return arrays[0]


def answer(
    config: Any,
    params: PyTree,
    question: Question,
    decoder_prompt: tuple[jax.Array | None, Any],
    options: GenerateOptions,
    generation_config: Mapping[str, Any],
    key: jax.Array | None,
    streamer: Streamer | None,
) -> jax.Array:
    """Generate the decoder's ids.

    Args:
        config: The architecture.
        params: The parameters.
        question: The encoder's inputs.
        decoder_prompt: ``decoder_input_ids`` and ``decoder_attention_mask`` of `Seq2SeqLM.generate`.
        options: The options that the call gives.
        generation_config: Contents of generation_config.json.
        key: Random key.
        streamer: Receiver of the tokens.

    Returns:
        Token ids (batch, length + n), the decoder's prompt in front.

    Raises:
        ValueError: If there is no start token, or the decoder's prompt ends in padding; also as `resolve`.
    """
    first = generation_config.get("decoder_start_token_id")
    if first is None:
        first = config.decoder_start_token_id
    if first is None:
        raise ValueError("The model has no decoder_start_token_id. Set it in generation_config.json or in the config.")
    ids, mask = with_start_token(first, len(question.given), *decoder_prompt)
    generation = resolve(
        options,
        generation_config,
        length=ids.shape[1],
        positions=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if question.attention_mask is not None:
        question = question._replace(attention_mask=jnp.asarray(question.attention_mask, bool))
    elif question.input_ids is not None:
        question = question._replace(attention_mask=padding_mask(question.input_ids, None, generation))
    generation = with_padding(generation)
    run = programs(config, generation, widened=is_widened(params))
    return run_programs(run, (params, question), ids, mask, generation, key, streamer)


def with_start_token(
    first: int | Sequence[int], batch: int, ids: jax.Array | None, mask: Any
) -> tuple[jax.Array, jax.Array]:
    """The decoder's prompt and its mask, with the start token in front unless a row has it there already.

    Several start tokens are those of the rows.
    """
    if ids is None and mask is not None:
        raise ValueError("decoder_attention_mask is for decoder_input_ids, which are not given. Leave it out.")
    starts = jnp.asarray(first, jnp.int32)
    if starts.ndim and len(starts) != batch:
        raise ValueError(
            f"decoder_start_token_id names {len(starts)} tokens, one a row, and the batch has {batch} rows. Give one "
            f"token for all, or {batch}."
        )
    column = jnp.broadcast_to(jnp.reshape(starts, (-1, 1)), (batch, 1))
    if ids is None:
        return column, jnp.ones_like(column, bool)
    if len(ids) != batch:
        raise ValueError(f"decoder_input_ids have {len(ids)} rows, but the encoder's inputs have {batch}.")
    mask = jnp.ones_like(ids, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != ids.shape:
        raise ValueError(f"decoder_attention_mask must be {ids.shape}, like decoder_input_ids, got {mask.shape}.")
    if bool(jnp.all(ids[:, 0] != column[:, 0])):
        ids = jnp.concatenate([column.astype(ids.dtype), ids], axis=1)
        mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
    refuse_padding_at_the_end(mask, "decoder prompt")
    return ids, mask


@functools.lru_cache(maxsize=64)
def programs(config: ModelConfig, generation: Generation, *, widened: bool) -> Programs:
    """The compiled programs of a generation, whose first argument is the parameters and a `Question`."""
    family = family_of(config)
    if family.encoder_decoder is None:
        raise ValueError(f"{article(config.model_type, first=True)} model is no encoder-decoder.")
    embed = adapt(partial(family.embed, config))
    encode, fill, decode = (adapt(partial(part, config)) for part in family.encoder_decoder)

    def decoder(inputs: tuple[Any, Question]) -> Decoder:
        adapted, question = inputs
        params, prompt = take_prompt(adapted, question.task_ids)

        def apply(inputs: ForwardInputs) -> Any:
            return decode(params, dataclasses.replace(inputs, position_ids=None))  # they are the cache's slots

        model = Cached(apply, partial(embed, params), Prompt(prefix=prompt.prefix))
        return Decoder(model, generation.eos_token_ids, generation.pad_token_id or 0, generation.sampling)

    def cache(inputs: tuple[Any, Question], batch: int, positions: int) -> Any:
        adapted, question = inputs
        params, prompt = take_prompt(adapted, question.task_ids)
        encoded, mask = question.encoder_outputs, question.attention_mask
        if encoded is None:
            encoder_inputs = ForwardInputs(
                input_ids=question.input_ids, inputs_embeds=question.inputs_embeds, attention_mask=mask
            )
            tokens = Prompt(tokens=prompt.tokens)
            output = apply_prompted(partial(encode, params), partial(embed, params), tokens, encoder_inputs)
            encoded = output.last_hidden_state
        elif prompt.tokens is not None:
            raise ValueError("encoder_outputs leave the prompt no place among the inputs. Give input_ids.")
        if mask is not None and prompt.tokens is not None:
            mask = seen_before(mask, prompt.tokens.shape[1])
        if prompt.prefix is not None:
            positions += prompt.prefix[0].shape[2]
        return fill(params, encoded, positions, attention_mask=mask)

    return make_programs(decoder, cache, generation.max_new_tokens, widened=widened)
