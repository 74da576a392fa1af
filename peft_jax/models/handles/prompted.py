"""A prompt in a model's forward pass: before the inputs, before keys and values, or beside the attention."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.models.config import SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.positions import KVCache, prefilled
from peft_jax.prompts.base import Prompt

REFUSED = {
    "position_ids": "Positions count from the first of them",
    "segment_ids": "Each text would need tokens of its own",
}
TYPED = (SEQ_CLS, TOKEN_CLS)  # the tasks for which PEFT hands token types on; virtual tokens are of type 0


def apply_prompted(
    apply: Callable[..., Any],
    embed: Callable[[jax.Array], jax.Array],
    prompt: Prompt,
    input_ids: jax.Array | None,
    given: Mapping[str, Any],
    task: str = "",
) -> Any:
    """Call an architecture with a prompt.

    Args:
        apply: ``apply(input_ids, **arrays)``.
        embed: The input embedding, from ids to ``(batch, length, hidden)``.
        prompt: What to put in.
        input_ids: Token ids ``(batch, length)``, or None if ``given`` has embeddings.
        given: The other arrays of the call, by name.
        task: What the model does, by PEFT's name for it.

    Raises:
        ValueError: if ``given`` has what makes no sense beside virtual tokens, or the prompt is for other rows.
    """
    given = dict(given)
    if (prompt.tokens is not None or prompt.prefix is not None) and "token_type_ids" in given and task not in TYPED:
        raise ValueError(
            f"token_type_ids= cannot be given beside a prompt for {task}, where PEFT drops them. Leave it out."
        )
    if prompt.adaption is not None:
        given["adaption"] = prompt.adaption
    if prompt.prefix is not None:
        given["prefix"] = prompt.prefix
        if "position_ids" in given:
            given["position_ids"] = given["position_ids"] + prompt.prefix[0].shape[2]
    if prompt.tokens is None:
        return apply(input_ids, **given)
    for name, why in REFUSED.items():
        if name in given:
            raise ValueError(f"{name}= cannot be given beside virtual tokens: {why}. Leave it out.")
    count = prompt.tokens.shape[1]
    if "attention_mask" in given:
        given["attention_mask"] = seen_before(given["attention_mask"], count)
    if "token_type_ids" in given:
        given["token_type_ids"] = jnp.pad(given["token_type_ids"], ((0, 0), (count, 0)))
    if prompt.decoder_tokens is not None:
        given = _in_decoder(prompt.decoder_tokens, embed, given)
    embeds = given.pop("inputs_embeds", None)
    if embeds is None and input_ids is not None:
        embeds = embed(input_ids)
    elif embeds is None or input_ids is not None:
        found = "neither" if input_ids is None else "both"
        raise ValueError(f"A call needs input_ids or inputs_embeds, one of them, got {found}.")
    return apply(None, inputs_embeds=after_tokens(prompt.tokens, embeds), **given)


def _in_decoder(tokens: jax.Array, embed: Callable[[jax.Array], jax.Array], given: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a call with virtual tokens before the decoder's inputs."""
    ids, embeds = given.pop("decoder_input_ids", None), given.pop("decoder_inputs_embeds", None)
    if (ids is None) == (embeds is None):
        found = "neither" if ids is None else "both"
        raise ValueError(
            f"A call needs decoder_input_ids, decoder_inputs_embeds or labels, got {found} of the first two."
        )
    if "decoder_attention_mask" in given:
        given["decoder_attention_mask"] = seen_before(given["decoder_attention_mask"], tokens.shape[1])
    return given | {"decoder_inputs_embeds": after_tokens(tokens, embed(ids) if embeds is None else embeds)}


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
    """An architecture with a prompt that goes into its cache once, before the inputs.

    Args:
        apply: ``apply(input_ids, **arrays)``.
        embed: The input embedding, from ids to ``(batch, length, hidden)``.
        prompt: What to put in.
    """

    def __init__(self, apply: Callable[..., Any], embed: Callable[[jax.Array], jax.Array], prompt: Prompt) -> None:
        self._apply, self._embed, self._prompt = apply, embed, prompt
        self.slots = 0 if prompt.tokens is None else prompt.tokens.shape[1]
        self.slots += 0 if prompt.prefix is None else prompt.prefix[0].shape[2]

    def first(self, input_ids: jax.Array, *, attention_mask: jax.Array, position_ids: jax.Array, cache: KVCache) -> Any:
        """Read the inputs, into an empty cache."""
        if self._prompt.prefix is not None:
            cache = prefilled(cache, self._prompt.prefix)
        if self._prompt.tokens is None:
            return self.apply(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)
        mask = seen_before(attention_mask, self.slots)
        embeds = after_tokens(self._prompt.tokens, self._embed(input_ids))
        return self._apply(None, inputs_embeds=embeds, attention_mask=mask, cache=cache)

    def apply(self, input_ids: jax.Array, *, attention_mask: jax.Array, position_ids: jax.Array, cache: KVCache) -> Any:
        """Read more of them. After virtual tokens positions are slots, padding included, as in PEFT."""
        given: dict[str, Any] = {"attention_mask": seen_before(attention_mask, self.slots), "cache": cache}
        if self._prompt.adaption is not None:
            given["adaption"] = self._prompt.adaption
        if self._prompt.tokens is None:
            given["position_ids"] = position_ids + self.slots
        return self._apply(input_ids, **given)
