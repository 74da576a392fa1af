"""Handles of encoders' tasks: classes of texts and of tokens, spans, features, and masked tokens."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.serialized_nodes import register_output
from peft_jax.models.config import FEATURE_EXTRACTION, MASKED_LM, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.handles.base import ModelHandle, register_handle
from peft_jax.models.handles.label_losses import (
    REGRESSION,
    class_labels,
    mean_cross_entropy,
    sequence_loss,
    span_loss,
)
from peft_jax.models.modules.outputs import HiddenStates
from peft_jax.prompts.base import task_array, with_virtual_labels

Ids = jax.Array | np.ndarray | None


def token_loss(model: ModelHandle, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy over labels ``(batch, length)``; virtual tokens of a prompt have none."""
    return mean_cross_entropy(logits, *with_virtual_labels(model.params, labels))


@register_output
class ClassifierOutput(NamedTuple):
    """The outputs of a classifier, or of a masked language model.

    Attributes:
        logits: ``(batch, n)`` of texts, ``(batch, length, n)`` of tokens.
        loss: Mean over the labels, float32; None without labels.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None without ``output_hidden_states=True``.
    """

    logits: jax.Array
    loss: jax.Array | None = None
    hidden_states: HiddenStates = None


@register_output
class SpanOutput(NamedTuple):
    """The outputs of a question-answering model.

    Attributes:
        start_logits: ``(batch, length)``, of the answer's first token.
        end_logits: ``(batch, length)``, of the answer's last token.
        loss: Mean over both, float32; None without positions.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None without ``output_hidden_states=True``.
    """

    start_logits: jax.Array
    end_logits: jax.Array
    loss: jax.Array | None = None
    hidden_states: HiddenStates = None


@register_output
class FeatureOutput(NamedTuple):
    """The outputs of a bare model.

    Attributes:
        last_hidden_state: ``(batch, length, hidden)``.
        pooler_output: ``(batch, hidden)``; None of a model without a pooler.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None without ``output_hidden_states=True``.
        router_logits: As `CausalLMOutput` has them.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array | None = None
    hidden_states: HiddenStates = None
    router_logits: jax.Array | None = None


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class SequenceClassifier(ModelHandle):
    """A classifier, or regressor, of texts.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.models import BertConfig
        >>> config = BertConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        ...                     num_attention_heads=2, num_labels=3)
        >>> model = pj.AutoModelForSequenceClassification.from_config(config)
        >>> model(jnp.array([[1, 2, 3]]), labels=jnp.array([2])).logits.shape
        (1, 3)
    """

    task = SEQ_CLS

    def __call__(
        self,
        input_ids: Ids = None,
        attention_mask: Ids = None,
        *,
        token_type_ids: Ids = None,
        position_ids: Ids = None,
        inputs_embeds: Ids = None,
        labels: Ids = None,
        task_ids: Ids = None,
        output_hidden_states: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> ClassifierOutput:
        """Logits of each text, compiled once per shape.

        Ids and labels are checked; inside `jax.jit`, where they have no values yet, one out of range gives NaN.

        Args:
            input_ids: Token ids ``(batch, length)``.
            attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``.
            token_type_ids: ``(batch, length)``, which of two texts a token belongs to; None is 0.
            position_ids: ``(batch, length)``; None counts as transformers does.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            labels: Classes ``(batch,)``, numbers for a regression, or 0/1 ``(batch, n)`` in float for several labels
                of one text; the config's ``problem_type`` says which, or if it is None their type.
            task_ids: Each row's task ``(batch,)``, for an adapter that has several.
            output_hidden_states: Whether to return the hidden states.
            adapter_names: Each row's adapter, as in `peft_jax.with_adapter_rows`; None for the active ones.

        Raises:
            ValueError: if a shape, an id or a label does not fit.
        """
        out = self.run(
            input_ids,
            output_hidden_states,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            adapter_names=adapter_names,
            task_ids=task_array(self.params, task_ids),
        )
        loss = None
        if labels is not None:
            problem, count = self.config.problem_type, self.config.num_labels
            is_regression = problem == REGRESSION or (problem is None and count == 1)
            labels = jnp.asarray(labels) if is_regression else class_labels(labels, count)
            loss = sequence_loss(out.logits, labels, problem)
        return ClassifierOutput(out.logits, loss, out.hidden_states)


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class TokenClassifier(ModelHandle):
    """A classifier of tokens."""

    task = TOKEN_CLS

    def __call__(
        self,
        input_ids: Ids = None,
        attention_mask: Ids = None,
        *,
        token_type_ids: Ids = None,
        position_ids: Ids = None,
        inputs_embeds: Ids = None,
        labels: Ids = None,
        task_ids: Ids = None,
        output_hidden_states: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> ClassifierOutput:
        """Logits of each token; arguments as those of `SequenceClassifier`, labels are classes ``(batch, length)``."""
        out = self.run(
            input_ids,
            output_hidden_states,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            adapter_names=adapter_names,
            task_ids=task_array(self.params, task_ids),
        )
        loss = None if labels is None else token_loss(self, out.logits, class_labels(labels, self.config.num_labels))
        return ClassifierOutput(out.logits, loss, out.hidden_states)


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class QuestionAnswerer(ModelHandle):
    """A model that finds the span of a text that answers a question."""

    task = QUESTION_ANS

    def __call__(
        self,
        input_ids: Ids = None,
        attention_mask: Ids = None,
        *,
        token_type_ids: Ids = None,
        position_ids: Ids = None,
        inputs_embeds: Ids = None,
        start_positions: Ids = None,
        end_positions: Ids = None,
        output_hidden_states: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> SpanOutput:
        """Logits of the answer's ends; arguments as those of `SequenceClassifier`.

        With start_positions and end_positions ``(batch,)`` there is a loss, in which positions outside the text are
        ignored. If there are virtual tokens of a prompt before the text, positions count them, as in PEFT.
        """
        out = self.run(
            input_ids,
            output_hidden_states,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            adapter_names=adapter_names,
        )
        starts, ends = out.logits[..., 0], out.logits[..., 1]
        if (start_positions is None) != (end_positions is None):
            raise ValueError("A loss needs start_positions and end_positions, got one of them. Give both, or neither.")
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(starts, ends, jnp.asarray(start_positions), jnp.asarray(end_positions))
        return SpanOutput(starts, ends, loss, out.hidden_states)


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class FeatureExtractor(ModelHandle):
    """A bare model, whose outputs are its last hidden states."""

    task = FEATURE_EXTRACTION

    def __call__(
        self,
        input_ids: Ids = None,
        attention_mask: Ids = None,
        *,
        token_type_ids: Ids = None,
        position_ids: Ids = None,
        inputs_embeds: Ids = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> FeatureOutput:
        """Features of each token and, with a pooler, of the text; arguments as those of `SequenceClassifier`.

        ``output_router_logits`` is as in `CausalLM`.
        """
        out = self.run(
            input_ids,
            output_hidden_states,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            adapter_names=adapter_names,
            output_router_logits=self.asks_routers(output_router_logits),
        )
        return FeatureOutput(out.last_hidden_state, out.pooler_output, out.hidden_states, out.router_logits)


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class MaskedLM(ModelHandle):
    """A language model that fills in masked tokens."""

    task = MASKED_LM

    def __call__(
        self,
        input_ids: Ids = None,
        attention_mask: Ids = None,
        *,
        token_type_ids: Ids = None,
        position_ids: Ids = None,
        inputs_embeds: Ids = None,
        labels: Ids = None,
        output_hidden_states: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> ClassifierOutput:
        """Logits of each token; arguments as those of `SequenceClassifier`, labels are ids ``(batch, length)``."""
        out = self.run(
            input_ids,
            output_hidden_states,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            adapter_names=adapter_names,
        )
        loss = None if labels is None else token_loss(self, out.logits, class_labels(labels, self.config.vocab_size))
        return ClassifierOutput(out.logits, loss, out.hidden_states)
