"""Model handles: a checkpoint's parameters and architecture as one immutable pytree that can be called."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout
from peft_jax.core.weight import is_weight
from peft_jax.models import llama
from peft_jax.models.checkpoint import save_model
from peft_jax.models.defaults import method_defaults
from peft_jax.models.generate import Streamer
from peft_jax.models.llama import LlamaConfig
from peft_jax.models.llama_generate import continue_prompts
from peft_jax.models.llama_keys import STACKED

IGNORED_LABEL = -100


class CausalLMOutput(NamedTuple):
    """What a call of a model handle gives.

    Attributes:
        logits: ``(batch, length, vocabulary)``.
        loss: Mean cross entropy over the labels, float32; None without labels.
        hidden_states: ``(layers + 1, batch, length, hidden)``; None unless asked for.
    """

    logits: jax.Array
    loss: jax.Array | None = None
    hidden_states: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where a model came from. All sources are equal, so that they stay out of the tree's structure.

    Attributes:
        name_or_path: Folder or hub id.
        generation_config: Contents of its generation_config.json.
    """

    name_or_path: str | None = None
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return hash(Source)


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("config", "source", "remat"))
@dataclasses.dataclass(frozen=True)
class CausalLM(Handle):
    """A causal language model; its parameters are its leaves, all else is static.

    Attributes:
        params: Nested dict of arrays and weights, by Hugging Face module names; layers are stacked.
        config: The architecture.
        source: Where the model came from.
        remat: Whether backward recomputes each layer instead of keeping its activations.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, 3)
    """

    params: Any
    config: LlamaConfig
    source: Source = Source()
    remat: bool = False

    def __call__(
        self,
        input_ids: jax.Array | np.ndarray | None = None,
        attention_mask: jax.Array | np.ndarray | None = None,
        *,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | np.ndarray | None = None,
        inputs_embeds: jax.Array | None = None,
        labels: jax.Array | np.ndarray | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Logits at all positions, compiled once per shape.

        Args:
            input_ids: Token ids ``(batch, length)``.
            attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``.
            position_ids: ``(batch, length)``; None counts from 0, whatever the padding, as transformers does.
            segment_ids: ``(batch, length)``, the number of the text that each token belongs to, for several texts
                packed into one row: each sees itself alone, and its positions count from 0.
            inputs_embeds: Embeddings ``(batch, length, hidden)`` instead of ``input_ids``.
            labels: Token ids ``(batch, length)`` for the loss; -100 counts for nothing. Logits at a position are
                compared with the label at the next, so labels are the ``input_ids``, masked.
            output_hidden_states: Whether to return the hidden states.
        """
        forward = _forward(self.config, self.remat, output_hidden_states)
        ids = None if input_ids is None else _token_ids(input_ids, self.config.vocab_size)
        arrays = (ids, inputs_embeds, attention_mask, position_ids, segment_ids)
        out = forward(self.params, *(None if array is None else jnp.asarray(array) for array in arrays))
        loss = None if labels is None else _shifted_loss(out.logits, jnp.asarray(labels))
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
        ids = _token_ids(input_ids, self.config.vocab_size)
        found = self.generation_config if generation_config is None else generation_config
        return continue_prompts(self.config, self.params, ids, attention_mask, asked, found, key, streamer)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_size: int = 5 * 10**9) -> None:
        """Write the files that transformers reads: configs, and safetensors in the leaves' element types.

        Args:
            directory: Folder to write to; made if need be.
            max_shard_size: Bytes of one weights file at most.

        Raises:
            ValueError: if a leaf is quantized or adapted.
        """
        weights = [leaf for leaf in jax.tree.leaves(self.params, is_leaf=is_weight) if is_weight(leaf)]
        if weights:
            raise ValueError(
                f"{len(weights)} leaves are quantized or adapted ({type(weights[0]).__name__}), which a Hugging Face "
                "checkpoint does not hold. Save pj.merge(model), or the adapter alone."
            )
        save_model(
            self.params,
            self.config,
            directory,
            generation_config=self.generation_config,
            max_shard_size=max_shard_size,
        )

    def num_parameters(self) -> int:
        """Elements of all parameters, of quantized ones as of dense ones."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_weight)
        return sum(int(np.prod(leaf.shape)) for leaf in leaves)

    @property
    def name_or_path(self) -> str | None:
        """Folder or hub id that the model was read from."""
        return self.source.name_or_path

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Contents of the checkpoint's generation_config.json; empty if it has none."""
        return self.source.generation_config

    @property
    def task_type(self) -> str:
        """PEFT's name of the task."""
        return "CAUSAL_LM"

    @property
    def input_module(self) -> str:
        """The embedding of input tokens."""
        return "model.embed_tokens"

    @property
    def output_module(self) -> str | None:
        """The language-modelling head."""
        return "lm_head"

    def defaults(self, peft_type: str) -> Mapping[str, tuple[str, ...]]:
        """PEFT's defaults for this model type, by field of the method's config."""
        return method_defaults(peft_type, self.config.model_type)

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Embedding and head, where they share a leaf."""
        return ("model.embed_tokens", "lm_head") if self.config.tie_word_embeddings else ()

    def layouts(self) -> Mapping[str, Layout]:
        """Axes of the stacked leaves; the others follow Flax's conventions."""
        return STACKED

    def untied(self) -> Self:
        """The same model with a head of its own beside the embedding."""
        if not self.config.tie_word_embeddings:
            return self
        table = self.params["model"]["embed_tokens"]["embedding"]
        head = {"kernel": jnp.transpose(table.dense() if is_weight(table) else table)}
        config = dataclasses.replace(self.config, tie_word_embeddings=False)
        return dataclasses.replace(self, params={**self.params, "lm_head": head}, config=config)

    def replace(self, params: Any) -> Self:
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)


def _token_ids(ids: Any, vocabulary: int) -> jax.Array:
    """Ids as an array; those that are not on a device yet are checked, as an index out of range gives NaN."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
        if ids.size and not (0 <= ids.min() and ids.max() < vocabulary):
            raise ValueError(
                f"input_ids are from {ids.min()} to {ids.max()}, but the vocabulary has ids 0 to {vocabulary - 1}. "
                "Use the tokenizer of this model, and -100 in labels alone."
            )
    return jnp.asarray(ids)


@functools.lru_cache(maxsize=64)
def _forward(config: LlamaConfig, remat: bool, output_hidden_states: bool) -> Callable[..., Any]:
    def forward(
        params: Any, input_ids: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, segment_ids: Any
    ) -> Any:
        return llama.apply(
            config,
            params,
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            remat=remat,
        )

    return jax.jit(adapt(forward))


@jax.jit
def _shifted_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of the logits at each position with the label at the next, float32."""
    logits, labels = logits[:, :-1].astype(jnp.float32), labels[:, 1:]
    counted = labels != IGNORED_LABEL
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)
    return jnp.sum(losses) / jnp.sum(counted, dtype=jnp.float32)
