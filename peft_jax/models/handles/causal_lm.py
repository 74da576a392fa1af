"""Causal language models: next-token loss and generation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.generation.causal import continue_prompts
from peft_jax.models.generation.decode import Streamer
from peft_jax.models.handles.base import (
    ModelHandle,
    Source,
    register_handle,
    token_ids,
)
from peft_jax.models.handles.label_losses import shifted_cross_entropy, token_labels
from peft_jax.prompts.base import task_array, with_virtual_labels

__all__ = ["CausalLM", "CausalLMOutput", "Source"]


class CausalLMOutput(NamedTuple):
    """What a call of a model handle gives.

    Attributes:
        logits: ``(batch, length, vocabulary)``; `LazyLogits` if asked for.
        loss: Mean cross entropy over the labels, float32; None without labels.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None unless asked for.
    """

    logits: Any
    loss: jax.Array | None = None
    hidden_states: jax.Array | None = None


@register_handle
@dataclasses.dataclass(frozen=True)
class CausalLM(ModelHandle):
    """A causal language model; its parameters are its leaves, all else is static.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, 3)
    """

    task = CAUSAL_LM

    def __call__(
        self,
        input_ids: jax.Array | np.ndarray | None = None,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | np.ndarray | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | np.ndarray | None = None,
        task_ids: jax.Array | np.ndarray | None = None,
        input_type_mask: jax.Array | np.ndarray | None = None,
        output_hidden_states: bool = False,
        lazy_logits: bool = False,
    ) -> CausalLMOutput:
        """Logits at all positions, compiled once per shape.

        Ids and labels are checked; inside `jax.jit`, where they have no values yet, one out of range gives NaN.

        A prompt's virtual tokens stand in front of the inputs, have logits and hidden states, and count for nothing in
        the loss.

        Args:
            input_ids: Token ids ``(batch, length)``.
            attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``.
            position_ids: ``(batch, length)``; None counts from 0, whatever the padding, as transformers does.
            segment_ids: ``(batch, length)``, the number of the text that each token belongs to, for several texts
                packed into one row: each sees itself alone, and its positions count from 0.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            labels: Token ids ``(batch, length)`` for the loss; -100 counts for nothing. Logits at a position are
                compared with the label at the next, so labels are the ``input_ids``, masked.
            task_ids: Each row's task ``(batch,)``, for a prompt that has several.
            input_type_mask: What each token is ``(batch, length)``, for the loss of CPT; see `CPTConfig`.
            output_hidden_states: Whether to return the hidden states.
            lazy_logits: Whether to return `LazyLogits`, of which `peft_jax.train.cross_entropy` makes a loss without
                holding all logits.

        Raises:
            ValueError: if labels are given beside lazy_logits, or input_type_mask without labels; also for inputs of a
                wrong shape, and ids or labels out of range.
        """
        if lazy_logits and labels is not None:
            raise ValueError("lazy_logits=True leaves the loss to peft_jax.train.cross_entropy. Leave labels out.")
        labels = None if labels is None else token_labels(labels, self.config.vocab_size)
        out = self.run(
            input_ids,
            output_hidden_states,
            not lazy_logits,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            task_ids=task_array(self.params, task_ids),
        )
        types = None if input_type_mask is None else jnp.asarray(input_type_mask)
        if types is not None and labels is None:
            raise ValueError("input_type_mask says which labels count, and none are given. Give labels too.")
        asked = None if labels is None else with_virtual_labels(self.params, labels, types)
        loss = None if asked is None else shifted_cross_entropy(out.logits, *asked)
        return CausalLMOutput(out.logits, loss, out.hidden_states)

    def generate(
        self,
        input_ids: jax.Array | np.ndarray,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        key: jax.Array | None = None,
        task_ids: jax.Array | np.ndarray | None = None,
        generation_config: Mapping[str, Any] | None = None,
        streamer: Streamer | None = None,
    ) -> jax.Array:
        """Prompts with their continuations, in one compiled program per shape.

        What is None is as the checkpoint's generation_config.json says, else as in transformers: 20 new tokens, greedy.

        Args:
            input_ids: Prompts ``(batch, length)``, padded on the left.
            attention_mask: 0 on the padding; None takes ``pad_token_id`` for padding, unless it ends a text too.
            max_new_tokens: At most so many tokens are added.
            do_sample: Draw tokens instead of taking the likeliest.
            temperature: Divides the logits before drawing.
            top_k: Draw from the ``top_k`` likeliest tokens only; 0 for all. Unless told otherwise, 50.
            top_p: Draw from the fewest likeliest tokens whose probability reaches ``top_p``.
            min_p: Draw from tokens whose probability is at least ``min_p`` times the likeliest's.
            repetition_penalty: Above 1, divides positive logits of tokens that were there and multiplies negative ones.
            eos_token_id: What ends a row; also several.
            pad_token_id: What follows; unless told otherwise, the first ``eos_token_id``.
            key: Random key for drawing; None means ``jax.random.key(0)``.
            task_ids: Each row's task ``(batch,)``, for a prompt that has several.
            generation_config: In place of the contents of generation_config.json; ``{}`` leaves that file aside.
            streamer: Its ``put`` is given the prompts, then each token as it comes (chunks are decoded in a program of
                their own), and its ``end`` is called; transformers' streamers fit.

        Returns:
            Token ids ``(batch, length + n)`` with n the tokens added until every row was done.

        Raises:
            ValueError: if an argument is out of range, a prompt is padded on the right, or generation_config.json asks
                for what is not supported.
        """
        asked = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        ids = token_ids(input_ids, self.config.vocab_size)
        found = self.generation_config if generation_config is None else generation_config
        params = (self.params, task_array(self.params, task_ids))
        return continue_prompts(self.config, params, ids, attention_mask, asked, found, key, streamer)
