"""Handles on sequence-to-sequence language models: an encoder, a decoder, and a head over the vocabulary."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.per_row import with_adapter_rows
from peft_jax.core.serialized_nodes import register_output
from peft_jax.models.config import SEQ_2_SEQ_LM
from peft_jax.models.generation.decode import Streamer
from peft_jax.models.generation.generate_options import GenerateKeywords, from_keywords
from peft_jax.models.generation.seq2seq import Question, answer
from peft_jax.models.handles.base import ModelHandle, register_handle, token_ids
from peft_jax.models.handles.label_losses import IGNORED_LABEL, mean_cross_entropy, token_labels
from peft_jax.models.handles.list_inputs import as_batch
from peft_jax.prompts.base import task_array, with_virtual_labels


@register_output
class Seq2SeqLMOutput(NamedTuple):
    """The outputs of a sequence-to-sequence language model.

    Attributes:
        logits: ``(batch, decoder's length, vocabulary)``.
        loss: Mean cross entropy over the labels, float32; None without labels.
        decoder_hidden_states: ``(decoder's layers + 1, batch, decoder's length, hidden)``; None without
            ``output_hidden_states=True``.
        encoder_last_hidden_state: The encoder's output, ``(batch, length, hidden)``.
        encoder_hidden_states: ``(layers + 1, batch, length, hidden)``; None without
            ``output_hidden_states=True``.
    """

    logits: jax.Array
    loss: jax.Array | None
    decoder_hidden_states: jax.Array | None
    encoder_last_hidden_state: jax.Array
    encoder_hidden_states: jax.Array | None


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class Seq2SeqLM(ModelHandle):
    """A sequence-to-sequence language model; its parameters are its leaves, all else is static.

    Example:
        >>> from peft_jax.models import T5Config
        >>> config = T5Config(vocab_size=16, hidden_size=8, head_dim=4, intermediate_size=12, num_hidden_layers=2,
        ...                   num_attention_heads=2)
        >>> model = pj.AutoModelForSeq2SeqLM.from_config(config)
        >>> model(jnp.array([[5, 6, 7, 1]]), labels=jnp.array([[8, 9, 1]])).logits.shape
        (1, 3, 16)
    """

    task = SEQ_2_SEQ_LM

    def __call__(
        self,
        input_ids: jax.Array | np.ndarray | None = None,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        decoder_input_ids: jax.Array | np.ndarray | None = None,
        decoder_attention_mask: jax.Array | np.ndarray | None = None,
        labels: jax.Array | np.ndarray | None = None,
        encoder_outputs: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        task_ids: jax.Array | np.ndarray | None = None,
        output_hidden_states: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits at all of the decoder's positions, compiled once per shape.

        Ids and labels are checked; inside `jax.jit`, where they have no values yet, one out of range gives NaN.

        Args:
            input_ids: The encoder's token ids ``(batch, length)``.
            attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``, for the encoder's attention and the
                decoder's cross-attention.
            decoder_input_ids: The decoder's token ids ``(batch, decoder's length)``; None makes them of the labels,
                shifted one position to the right after the start token.
            decoder_attention_mask: The same for the decoder, ``(batch, decoder's length)``.
            labels: Token ids ``(batch, decoder's length)`` for the loss; -100 is ignored. Logits at a position
                are compared with the label at the same position.
            encoder_outputs: The encoder's output ``(batch, length, hidden)``, as ``encoder_last_hidden_state`` of a
                previous call, instead of ``input_ids``.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            decoder_inputs_embeds: Embeddings ``(batch, decoder's length, hidden)`` instead of ``decoder_input_ids``.
            task_ids: Each row's task ``(batch,)``, for an adapter that has several.
            output_hidden_states: Whether to return the hidden states.
            adapter_names: Each row's adapter, as in `peft_jax.with_adapter_rows`; None for the active ones.

        Raises:
            ValueError: if inputs are missing, given twice, or of a wrong shape, or ids or labels are out of range.
        """
        labels = None if labels is None else token_labels(as_batch(labels, "labels"), self.config.vocab_size)
        if decoder_input_ids is None and decoder_inputs_embeds is None and labels is not None:
            decoder_input_ids = self.shifted_right(labels)
        elif decoder_input_ids is not None:
            decoder_input_ids = token_ids(decoder_input_ids, self.config.vocab_size, "decoder_input_ids")
        out: Any = self.run(
            input_ids,
            output_hidden_states,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            task_ids=task_array(self.params, task_ids),
            adapter_names=adapter_names,
        )
        loss = None
        if labels is not None:
            if labels.shape != out.logits.shape[:2]:  # virtual tokens of the decoder have logits too
                labels, _ = with_virtual_labels(self.params, labels)
            loss = mean_cross_entropy(out.logits, labels)
        states = out.decoder_hidden_states, out.encoder_last_hidden_state, out.encoder_hidden_states
        return Seq2SeqLMOutput(out.logits, loss, *states)

    def shifted_right(self, labels: jax.Array | np.ndarray) -> jax.Array:
        """Labels ``(batch, length)`` as the decoder's inputs: after the start token, with padding for -100.

        Raises:
            ValueError: if the model's config names no start token, several, or no padding.
        """
        config: Any = self.config
        start, pad = config.decoder_start_token_id, config.pad_token_id
        if start is None or pad is None:
            name = "decoder_start_token_id" if start is None else "pad_token_id"
            raise ValueError(f"The config has no {name}, which labels are shifted with. Give decoder_input_ids too.")
        if isinstance(start, tuple):
            raise ValueError(
                f"The config has decoder_start_token_id={list(start)}, one a row, which labels are not shifted with. "
                "Name one token, or give decoder_input_ids too."
            )
        ids = jnp.asarray(labels)
        ids = jnp.concatenate([jnp.full_like(ids[:, :1], start), ids[:, :-1]], axis=1)
        return jnp.where(ids == IGNORED_LABEL, jnp.full_like(ids, pad), ids)

    def generate(
        self,
        input_ids: jax.Array | np.ndarray | None = None,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        encoder_outputs: jax.Array | None = None,
        decoder_input_ids: jax.Array | np.ndarray | None = None,
        decoder_attention_mask: jax.Array | np.ndarray | None = None,
        key: jax.Array | None = None,
        task_ids: jax.Array | np.ndarray | None = None,
        generation_config: Mapping[str, Any] | None = None,
        streamer: Streamer | None = None,
        adapter_names: Sequence[str] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> jax.Array:
        """Answers to inputs, in one compiled program per shape; the encoder runs once.

        Args:
            input_ids: The encoder's token ids ``(batch, length)``, padded on any side.
            attention_mask: 0 on the padding. None takes ``pad_token_id`` for padding, unless that token ends a row too.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            encoder_outputs: The encoder's output ``(batch, length, hidden)``, instead of either.
            decoder_input_ids: The first tokens of the answers ``(batch, n)``, padded on the left; the start token is
                put in front unless a row has it there. None means the start token alone.
            decoder_attention_mask: 0 on its padding.
            key: Random key for sampling; None means ``jax.random.key(0)``.
            task_ids: Each row's task ``(batch,)``, for an adapter that has several.
            generation_config: Used instead of the contents of generation_config.json; ``{}`` ignores that file.
            streamer: Receives the first tokens of the answers, then each token as soon as it is decoded, as in
                `CausalLM.generate`.
            adapter_names: Each row's adapter, as in `peft_jax.with_adapter_rows`; None for the active ones.
            **options: The fields of `peft_jax.models.generation.generate_options.GenerateOptions`.

        Returns:
            Token ids ``(batch, n + new)``, with the start token in front.

        Raises:
            TypeError: if there is no such option.
            ValueError: if an argument is out of range, the decoder's inputs end in padding, or generation_config.json
                asks for an option that is not supported.
        """
        chosen = from_keywords(options, self.generate)
        vocabulary = self.config.vocab_size
        ids = None if input_ids is None else token_ids(input_ids, vocabulary)
        decoder_ids = None
        if decoder_input_ids is not None:
            decoder_ids = token_ids(decoder_input_ids, vocabulary, "decoder_input_ids")
        params = self.params
        if adapter_names is not None:
            params, task_ids = with_adapter_rows(params, adapter_names, task_ids), None
        tasks = task_array(params, task_ids)
        mask = as_batch(attention_mask, "attention_mask")
        question = Question(ids, inputs_embeds, encoder_outputs, mask, tasks)
        if generation_config is None:
            generation_config = self.generation_config
        decoder_prompt = (decoder_ids, as_batch(decoder_attention_mask, "decoder_attention_mask"))
        return answer(self.config, params, question, decoder_prompt, chosen, generation_config, key, streamer)
