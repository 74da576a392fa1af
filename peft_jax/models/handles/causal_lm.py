"""Causal language models: next-token loss and generation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.per_row import with_adapter_rows
from peft_jax.core.serialized_nodes import register_output
from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.generation.causal import continue_prompts
from peft_jax.models.generation.decode import Streamer
from peft_jax.models.generation.generate_options import GenerateKeywords, from_keywords
from peft_jax.models.handles.base import (
    ModelHandle,
    Source,
    register_handle,
    token_ids,
)
from peft_jax.models.handles.label_losses import shifted_mean_cross_entropy, token_labels
from peft_jax.models.handles.list_inputs import as_batch
from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.models.modules.outputs import HiddenStates
from peft_jax.models.modules.router_load import router_load
from peft_jax.prompts.base import task_array, with_virtual_labels

__all__ = ["CausalLM", "CausalLMOutput", "Source"]


@register_output
class CausalLMOutput(NamedTuple):
    """The outputs of a causal language model.

    Attributes:
        logits: ``(batch, length, vocabulary)``; `LazyLogits` with ``lazy_logits=True``.
        loss: Mean cross entropy over the labels, float32, with the routers' loss if there is one; None without labels.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None without ``output_hidden_states=True``.
        router_logits: With ``output_router_logits=True`` the outputs of the routers of all layers that have one,
            ``(layers, batch * length, experts)``; else None.
        aux_loss: With them the routers' load balancing loss, float32, of which ``loss`` has the config's
            ``router_aux_loss_coef`` times as much.
    """

    logits: Any
    loss: jax.Array | None = None
    hidden_states: HiddenStates = None
    router_logits: jax.Array | None = None
    aux_loss: jax.Array | None = None


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
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
        output_router_logits: bool | None = None,
        lazy_logits: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> CausalLMOutput:
        """Logits at all positions, compiled once per shape.

        Ids and labels are checked; inside `jax.jit`, where they have no values yet, one out of range gives NaN.

        A prompt's virtual tokens come before the inputs. They have logits and hidden states, and are ignored in the
        loss.

        Args:
            input_ids: Token ids ``(batch, length)``.
            attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``.
            position_ids: ``(batch, length)``; None counts from 0, whatever the padding, as transformers does.
            segment_ids: ``(batch, length)``, the number of the text that each token belongs to, for several texts
                packed into one row: tokens attend to their own text only, and its positions count from 0.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            labels: Token ids ``(batch, length)`` for the loss; -100 is ignored. Logits at a position are
                compared with the label at the next, so labels are the ``input_ids``, masked.
            task_ids: Each row's task ``(batch,)``, for an adapter that has several.
            input_type_mask: The type of each token ``(batch, length)``, for the loss of CPT; see `CPTConfig`.
            output_hidden_states: Whether to return the hidden states.
            output_router_logits: Whether to return the logits of the routers of a mixture of experts, and to add their
                load balancing loss, where they have one, to that of the labels; None asks the config's field of that
                name. Tokens of padding are ignored in it, and virtual ones are not.
            lazy_logits: Whether to return `LazyLogits`, from which `peft_jax.train.cross_entropy` computes the loss
                without holding all logits. They are an array where an X-LoRA is on the output head.
            adapter_names: Each row's adapter, as in `peft_jax.with_adapter_rows`; None for the active ones.

        Raises:
            ValueError: if labels are given beside lazy_logits, or input_type_mask without labels; also for inputs of a
                wrong shape, and ids or labels out of range.
        """
        if lazy_logits and labels is not None:
            raise ValueError("lazy_logits=True leaves the loss to peft_jax.train.cross_entropy. Leave labels out.")
        labels = None if labels is None else token_labels(as_batch(labels, "labels"), self.config.vocab_size)
        input_ids = as_batch(input_ids, "input_ids")
        model = self.prepared_for(input_ids, segment_ids)
        out = model.run(
            input_ids,
            output_hidden_states,
            not lazy_logits,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            task_ids=task_array(self.params, task_ids),
            adapter_names=adapter_names,
            output_router_logits=self.asks_routers(output_router_logits),
        )
        load = None
        if out.router_logits is not None and self.has_router_loss:
            load = router_load(out.router_logits, as_batch(attention_mask, "attention_mask"), self.config.routing)
        beside = self.shadow_logits(out)
        if lazy_logits and beside is not None:
            out = out._replace(logits=dataclasses.replace(out.logits, beside=beside))
        types = None if input_type_mask is None else jnp.asarray(input_type_mask)
        if types is not None and labels is None:
            raise ValueError("input_type_mask says which labels count, and none are given. Give labels too.")
        loss = None
        if labels is not None:
            all_labels, weights = with_virtual_labels(self.params, labels, types)
            loss = shifted_mean_cross_entropy(out.logits, all_labels, weights)
            if beside is not None:
                loss = loss + beside.factor * shifted_mean_cross_entropy(beside.compute(), all_labels, weights)
        if load is None:
            return CausalLMOutput(out.logits, loss, out.hidden_states, out.router_logits)
        aux_loss = load.loss()
        loss = None if loss is None else loss + load.factor * aux_loss
        logits = out.logits
        if lazy_logits and not isinstance(logits, LazyLogits):
            raise ValueError("An X-LoRA on the output head has no loss of routers. Write output_router_logits=False.")
        if lazy_logits:
            logits = dataclasses.replace(logits, load=load)
        return CausalLMOutput(logits, loss, out.hidden_states, out.router_logits, aux_loss)

    def prepared_for(
        self, input_ids: jax.Array | np.ndarray | None, segment_ids: jax.Array | np.ndarray | None = None
    ) -> Self:
        """The model that runs these ids: this one, unless it has adapters that depend on the ids."""
        return self

    def generate(
        self,
        input_ids: jax.Array | np.ndarray,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        key: jax.Array | None = None,
        task_ids: jax.Array | np.ndarray | None = None,
        generation_config: Mapping[str, Any] | None = None,
        streamer: Streamer | None = None,
        adapter_names: Sequence[str] | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> jax.Array:
        """Prompts with their continuations, in one compiled program per shape.

        Args:
            input_ids: Prompts ``(batch, length)``, padded on the left; a list of ids is one prompt.
            attention_mask: 0 on the padding. None takes ``pad_token_id`` for padding, unless that token ends a row too.
            key: Random key for sampling; None means ``jax.random.key(0)``.
            task_ids: Each row's task ``(batch,)``, for an adapter that has several.
            generation_config: Used instead of the contents of generation_config.json; ``{}`` ignores that file.
            streamer: Receives the prompts, then each token as soon as it is decoded: its ``put`` is called with them,
                and at the end its ``end``. transformers' streamers fit. Chunks are decoded in a program of their own.
            adapter_names: Each prompt's adapter, as in `peft_jax.with_adapter_rows`; None for the active ones.
            **options: The fields of `peft_jax.models.generation.generate_options.GenerateOptions`.

        Returns:
            Token ids ``(batch, length + n)`` with n the number of tokens added until every row was done.

        Raises:
            TypeError: if there is no such option.
            ValueError: if an argument is out of range, a prompt is padded on the right, or generation_config.json
                asks for an option that is not supported.
        """
        chosen = from_keywords(options, self.generate)
        ids = token_ids(input_ids, self.config.vocab_size)
        attention_mask = as_batch(attention_mask, "attention_mask")
        model = self.prepared_for(ids)
        if adapter_names is not None:
            model, task_ids = with_adapter_rows(model, adapter_names, task_ids), None
        if generation_config is None:
            generation_config = self.generation_config
        params = (model.params, task_array(model.params, task_ids))
        return continue_prompts(self.config, params, ids, attention_mask, chosen, generation_config, key, streamer)
