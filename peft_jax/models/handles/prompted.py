"""A prompt in a model's forward pass: before the inputs, before keys and values, or beside the attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.models.config import SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import prefilled
from peft_jax.prompts.base import Prompt

REFUSED = {
    "position_ids": "Positions count from the first of them",
    "segment_ids": "Each text would need tokens of its own",
}
TYPED = (SEQ_CLS, TOKEN_CLS)  # the tasks for which PEFT passes token types to the model; virtual tokens are of type 0


def apply_prompted(
    apply: Callable[[ForwardInputs], Any],
    embed: Callable[[jax.Array], jax.Array],
    prompt: Prompt,
    inputs: ForwardInputs,
    task: str = "",
) -> Any:
    """Call an architecture with a prompt.

    Args:
        apply: The architecture.
        embed: The input embedding, from ids to ``(batch, length, hidden)``.
        prompt: The prompt.
        inputs: The inputs of the call.
        task: PEFT's name of the model's task.

    Raises:
        ValueError: if an input makes no sense beside virtual tokens, or the prompt is for other rows.
    """
    has_virtual = prompt.tokens is not None or prompt.prefix is not None
    if has_virtual and inputs.token_type_ids is not None and task not in TYPED:
        raise ValueError(
            f"token_type_ids= cannot be given beside a prompt for {task}, where PEFT drops them. Leave it out."
        )
    if prompt.adaption is not None:
        inputs = dataclasses.replace(inputs, adaption=prompt.adaption)
    if prompt.prefix is not None:
        inputs = dataclasses.replace(inputs, prefix=prompt.prefix)
        if inputs.position_ids is not None:
            inputs = dataclasses.replace(inputs, position_ids=inputs.position_ids + inputs.virtual)
    if prompt.decoder_tokens is not None:
        inputs = _in_decoder(prompt.decoder_tokens, embed, inputs)
    if prompt.tokens is not None:
        inputs = _with_tokens(prompt.tokens, embed, inputs)
    return apply(inputs)


def _with_tokens(tokens: jax.Array, embed: Callable[[jax.Array], jax.Array], inputs: ForwardInputs) -> ForwardInputs:
    """The inputs of a call with virtual tokens before them."""
    for name, why in REFUSED.items():
        if getattr(inputs, name) is not None:
            raise ValueError(f"{name}= cannot be given beside virtual tokens: {why}. Leave it out.")
    count = tokens.shape[1]
    if inputs.attention_mask is not None:
        inputs = dataclasses.replace(inputs, attention_mask=seen_before(inputs.attention_mask, count))
    if inputs.token_type_ids is not None:
        inputs = dataclasses.replace(inputs, token_type_ids=jnp.pad(inputs.token_type_ids, ((0, 0), (count, 0))))
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    if ids is not None and embeds is None:
        embeds = embed(ids)
    elif embeds is None or ids is not None:
        given = "neither" if ids is None else "both"
        raise ValueError(f"A call needs input_ids or inputs_embeds, one of them, got {given}.")
    return dataclasses.replace(inputs, input_ids=None, inputs_embeds=after_tokens(tokens, embeds))


def _in_decoder(tokens: jax.Array, embed: Callable[[jax.Array], jax.Array], inputs: ForwardInputs) -> ForwardInputs:
    """The inputs of a call with virtual tokens before the decoder's."""
    ids, embeds, mask = inputs.decoder_input_ids, inputs.decoder_inputs_embeds, inputs.decoder_attention_mask
    if ids is not None and embeds is None:
        embeds = embed(ids)
    elif embeds is None or ids is not None:
        given = "neither" if ids is None else "both"
        raise ValueError(
            f"A call needs decoder_input_ids, decoder_inputs_embeds or labels, got {given} of the first two."
        )
    if mask is not None:
        mask = seen_before(mask, tokens.shape[1])
    embeds = after_tokens(tokens, embeds)
    return dataclasses.replace(
        inputs, decoder_input_ids=None, decoder_inputs_embeds=embeds, decoder_attention_mask=mask
    )


def after_tokens(tokens: jax.Array, embeds: jax.Array) -> jax.Array:
    """Embeddings (batch, length, hidden) after virtual tokens (1 or batch, n, hidden)."""
    rows = embeds.shape[0]
    if tokens.shape[0] not in (1, rows):
        raise ValueError(f"task_ids has {tokens.shape[0]} rows, and the inputs have {rows}. Give one a row.")
    tokens = jnp.broadcast_to(tokens, (rows, *tokens.shape[1:])).astype(embeds.dtype)
    return jnp.concatenate([tokens, embeds], axis=1)


def seen_before(mask: jax.Array, count: int) -> jax.Array:
    """A 0/1 mask (batch, length) with columns of ones in front."""
    return jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)


class Cached:
    """An architecture with a prompt, which is written into its cache once, before the inputs.

    Args:
        apply: The architecture.
        embed: The input embedding, from ids to ``(batch, length, hidden)``.
        prompt: The prompt.
    """

    def __init__(
        self, apply: Callable[[ForwardInputs], Any], embed: Callable[[jax.Array], jax.Array], prompt: Prompt
    ) -> None:
        self._apply, self._embed, self._prompt = apply, embed, prompt
        self.slots = 0
        if prompt.tokens is not None:
            self.slots += prompt.tokens.shape[1]
        if prompt.prefix is not None:
            self.slots += prompt.prefix[0].shape[2]

    def first(self, inputs: ForwardInputs) -> Any:
        """Read ids, with their mask and positions, into an empty cache."""
        if self._prompt.prefix is not None:
            inputs = dataclasses.replace(inputs, cache=prefilled(inputs.cache, self._prompt.prefix))
        if self._prompt.tokens is None:
            return self.apply(inputs)
        inputs = dataclasses.replace(inputs, position_ids=None)
        return self._apply(_with_tokens(self._prompt.tokens, self._embed, inputs))

    def apply(self, inputs: ForwardInputs) -> Any:
        """Read further ids. After virtual tokens positions are slots of the cache, padding included, as in PEFT."""
        positions = None
        if self._prompt.tokens is None and inputs.position_ids is not None:
            positions = inputs.position_ids + self.slots
        if inputs.attention_mask is not None:
            inputs = dataclasses.replace(inputs, attention_mask=seen_before(inputs.attention_mask, self.slots))
        return self._apply(dataclasses.replace(inputs, position_ids=positions, adaption=self._prompt.adaption))
