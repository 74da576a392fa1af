"""Output heads of BERT and RoBERTa."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.bert.config import BertConfig, RobertaConfig
from peft_jax.models.config import FEATURE_EXTRACTION, MASKED_LM, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.modules.base_dropout import Site, dropped
from peft_jax.models.modules.heads import head_width
from peft_jax.models.modules.layers import LayerNorm, linear_maker
from peft_jax.models.modules.outputs import ModelOutput

CLASSIFIERS = {SEQ_CLS: "classifier", TOKEN_CLS: "classifier", QUESTION_ANS: "qa_outputs"}


class BertTransform(nnx.Module):
    """A layer as wide as the encoder, before the vocabulary."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear_maker(config, dtype, rngs)(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)


class BertPredictions(nnx.Module):
    """The transform, the decoder (the embedding, where they are tied) and its bias."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.act = config.hidden_act
        self.transform = BertTransform(config, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))
        _add_decoder(self, config, dtype, rngs)

    def __call__(self, h: jax.Array, table: Any) -> jax.Array:
        """Logits (batch, length, vocabulary) of h (batch, length, hidden)."""
        h = self.transform.LayerNorm(ACTIVATIONS[self.act](self.transform.dense(h)))
        return _decode(self, h, table)


class BertOnlyMLMHead(nnx.Module):
    """The module that transformers puts around the predictions."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.predictions = BertPredictions(config, dtype, rngs)

    def __call__(self, h: jax.Array, table: Any) -> jax.Array:
        """Logits (batch, length, vocabulary) of h (batch, length, hidden)."""
        return self.predictions(h, table)


class RobertaLMHead(nnx.Module):
    """A layer, a norm, the decoder (the embedding, where they are tied) and its bias."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear_maker(config, dtype, rngs)(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))
        _add_decoder(self, config, dtype, rngs)

    def __call__(self, h: jax.Array, table: Any) -> jax.Array:
        """Logits (batch, length, vocabulary) of h (batch, length, hidden)."""
        return _decode(self, self.layer_norm(ACTIVATIONS["gelu"](self.dense(h))), table)


class RobertaClassificationHead(nnx.Module):
    """Two layers on the first token's output."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, self.rate = linear_maker(config, dtype, rngs), config.rates.head
        self.dense = linear(config.hidden_size, config.hidden_size)
        self.out_proj = linear(config.hidden_size, config.num_labels)

    def __call__(self, h: jax.Array, key: jax.Array | None) -> jax.Array:
        """Logits (batch, n) of h (batch, length, hidden)."""
        inner = jnp.tanh(self.dense(dropped(h[:, 0], key, self.rate, Site.HEAD)))
        return self.out_proj(dropped(inner, key, self.rate, Site.HEAD_OUT))


def add_head(module: Any, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    """Put the head for the config's task into a module."""
    task, is_roberta = config.task_type, isinstance(config, RobertaConfig)
    if task == MASKED_LM and is_roberta:
        module.lm_head = RobertaLMHead(config, dtype, rngs)
    elif task == MASKED_LM:
        module.cls = BertOnlyMLMHead(config, dtype, rngs)
    elif task == SEQ_CLS and is_roberta:
        module.classifier = RobertaClassificationHead(config, dtype, rngs)
    elif task != FEATURE_EXTRACTION:
        linear = linear_maker(config, dtype, rngs)
        setattr(module, CLASSIFIERS[task], linear(config.hidden_size, head_width(config)))


def run_head(
    module: Any, config: BertConfig, h: jax.Array, pooled: jax.Array | None, table: Any, key: jax.Array | None
) -> ModelOutput:
    """The head's output for the encoder's h (batch, length, hidden) and the pooler's; table is the embedding."""
    task, is_roberta = config.task_type, isinstance(config, RobertaConfig)
    if task == FEATURE_EXTRACTION:
        return ModelOutput(last_hidden_state=h, pooler_output=pooled)
    if task == MASKED_LM:
        return ModelOutput((module.lm_head if is_roberta else module.cls)(h, table))
    head = getattr(module, CLASSIFIERS[task])
    if task == SEQ_CLS and is_roberta:
        return ModelOutput(head(h, key))
    return ModelOutput(head(dropped(h if pooled is None else pooled, key, config.rates.head, Site.HEAD)))


def _add_decoder(module: Any, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
    if not config.tie_word_embeddings:
        linear = linear_maker(config, dtype, rngs)
        module.decoder = linear(config.hidden_size, config.vocab_size, use_bias=False)


def _decode(module: Any, h: jax.Array, table: Any) -> jax.Array:
    logits = module.decoder(h) if hasattr(module, "decoder") else h @ table[...].T
    return logits + jnp.reshape(module.bias[...], (1, 1, -1))
