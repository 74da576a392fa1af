"""Output heads of decoders: next tokens, a class of the text by its last token, a class of each token, a span."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.models.config import CAUSAL_LM, FEATURE_EXTRACTION, QUESTION_ANS, SEQ_CLS, ModelConfig
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.outputs import ModelOutput

SPAN = 2  # outputs of a question-answering head: the span's start and end
FEW = 64  # rows up to which a bfloat16 product with a float32 result is the faster one on a CPU


def head_width(config: ModelConfig) -> int:
    """Number of outputs of the head."""
    return {CAUSAL_LM: config.vocab_size, QUESTION_ANS: SPAN}.get(config.task_type, config.num_labels)


@dataclasses.dataclass(frozen=True)
class DecoderHead:
    """The linear layer on top of a decoder.

    Attributes:
        names: Its module's name by task.
        lm_bias: Whether that of a language model has a bias.
    """

    names: Mapping[str, str]
    lm_bias: bool = False

    def add(self, module: Any, config: ModelConfig, linear: Callable[..., Any]) -> None:
        """Put the layer for the config's task, made by ``linear``, into a module; none if it is the embedding's."""
        task = config.task_type
        if task == FEATURE_EXTRACTION or (task == CAUSAL_LM and config.tie_word_embeddings):
            return
        bias = self.lm_bias if task == CAUSAL_LM else task != SEQ_CLS
        setattr(module, self.names[task], linear(config.embedding_size, head_width(config), use_bias=bias))

    def run(self, module: Any, config: ModelConfig, h: jax.Array, inputs: ForwardInputs, table: Any) -> Any:
        """The head's output for the last layer's h (batch, length, hidden); table is the embedding."""
        if config.task_type == FEATURE_EXTRACTION:
            return ModelOutput(last_hidden_state=h)
        if config.task_type == CAUSAL_LM and config.tie_word_embeddings:
            return ModelOutput(config.logits_form(project(h, table[...].T)))
        head = getattr(module, self.names[config.task_type])
        if config.task_type == CAUSAL_LM:
            logits = project(h, head.kernel[...])
            if self.lm_bias:
                logits = logits + head.bias[...][None, None].astype(logits.dtype)
            return ModelOutput(config.logits_form(logits))
        logits = head(dropped(h, inputs.dropout_key, config.rates.head, Site.HEAD))
        if config.task_type == SEQ_CLS:
            return ModelOutput(of_last_token(logits, inputs.input_ids, config.pad_token_id))
        return ModelOutput(logits)


def project(h: jax.Array, kernel: jax.Array) -> jax.Array:
    """Logits (batch, length, vocabulary) of h (batch, length, hidden), in the wider of the two element types.

    They are rounded to it once, after sums in float32. XLA's CPU backend makes a bfloat16 product of float32 copies,
    and for few rows, as in decoding, to copy the head takes longer than the product; asked for float32 it makes none.
    """
    wide = jnp.promote_types(h.dtype, kernel.dtype)
    x, matrix = h.astype(wide), kernel.astype(wide)
    rows = math.prod(h.shape[:-1])
    if wide == jnp.bfloat16 and 1 < rows <= FEW and jax.default_backend() == "cpu":
        return jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(wide)
    return x @ matrix


def of_last_token(logits: jax.Array, input_ids: jax.Array | None, pad_token_id: int | None) -> jax.Array:
    """The logits (batch, n) at the last token of each row that is not padding, as transformers finds it.

    Args:
        logits: (batch, length, n).
        input_ids: (batch, length); None takes the last position.
        pad_token_id: What padding is.

    Raises:
        ValueError: There are several rows, and nothing says what padding is.
    """
    batch, length, _ = logits.shape
    if pad_token_id is None and batch > 1:
        raise ValueError("Classifying several texts needs pad_token_id in the model's config.json, to find their ends.")
    if pad_token_id is None or input_ids is None:
        return logits[:, -1]
    last = jnp.argmax(jnp.where(input_ids != pad_token_id, jnp.arange(length)[None], 0), axis=1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
