"""The inputs that architectures take, as one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax

from peft_jax.models.modules.kv_cache import Prefix
from peft_jax.models.modules.shadow_state import Shadow
from peft_jax.prompts.base import Adaption

# Fields that every causal model takes, and that models with routers take.
CAUSAL = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "segment_ids",
        "cache",
        "prefix",
        "adaption",
        "shadow",
        "dropout_key",
        "output_hidden_states",
        "logits_to_keep",
        "head",
        "remat",
    )
)
ROUTED = CAUSAL | {"output_router_logits"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """The inputs of one forward pass; an architecture says by ``takes`` which of them it knows.

    A pytree: arrays are leaves, the last five are static.

    Attributes:
        input_ids: Token ids ``(batch, length)``; an encoder-decoder's encoder reads them.
        inputs_embeds: Instead of them, embeddings ``(batch, length, hidden)``.
        attention_mask: 0/1 ``(batch, length)``, or with a cache ``(batch, index + length)`` up to ``(batch, max_len)``.
        token_type_ids: ``(batch, length)``, whose embeddings are added.
        position_ids: ``(batch, length)`` or ``(1, length)``. By default 0, 1, ..., counted on from the cache's index.
        segment_ids: ``(batch, length)``, the number of the text that each token belongs to, for several texts packed
            into one row: each sees itself alone, and its positions count from 0. Not with a cache.
        encoder_outputs: Instead of the encoder's inputs, its output ``(batch, length, hidden)``.
        decoder_input_ids: The decoder's token ids ``(batch, decoder's length)``.
        decoder_inputs_embeds: Instead of them, embeddings ``(batch, decoder's length, hidden)``.
        decoder_attention_mask: 0/1 ``(batch, decoder's length)``.
        cache: Keys and values of earlier positions, a `KVCache` or an architecture's own. The caller sees to it that
            index + length does not exceed max_len (an index is an array, which a compiled program cannot check).
        prefix: Keys and values that all positions see before those of the inputs, each
            ``(layers, batch or 1, n_virtual, kv_heads, head_dim)``. Positions count on from n_virtual.
        cross_prefix: The same before the encoder's output, for the attention to it.
        adaption: Gated prompts beside each layer's attention.
        shadow: The state of a shadow network that goes through the layers beside their input.
        dropout_key: The random key of the base's dropout (`peft_jax.models.modules.base_dropout`); None for none.
        output_hidden_states: Also return the hidden states.
        output_router_logits: Also return the outputs of the routers that choose experts.
        logits_to_keep: Compute the logits at so many last positions only; 0 for all.
        head: Whether to compute logits; if not, the output has what goes into the head.
        remat: Keep only each layer's input for the backward pass and compute the rest again.
    """

    input_ids: jax.Array | None = None
    inputs_embeds: jax.Array | None = None
    attention_mask: jax.Array | None = None
    token_type_ids: jax.Array | None = None
    position_ids: jax.Array | None = None
    segment_ids: jax.Array | None = None
    encoder_outputs: jax.Array | None = None
    decoder_input_ids: jax.Array | None = None
    decoder_inputs_embeds: jax.Array | None = None
    decoder_attention_mask: jax.Array | None = None
    cache: Any = None
    prefix: Prefix | None = None
    cross_prefix: Prefix | None = None
    adaption: Adaption | None = None
    shadow: Shadow | None = None
    dropout_key: jax.Array | None = None
    output_hidden_states: bool = False
    output_router_logits: bool = False
    logits_to_keep: int = 0
    head: bool = True
    remat: bool = False

    @property
    def virtual(self) -> int:
        """The number of positions that the prefix takes."""
        return 0 if self.prefix is None else self.prefix[0].shape[2]

    def check(self, takes: Collection[str], architecture: str) -> None:
        """Raise ValueError if something is given that an architecture does not take.

        Example:
            >>> ForwardInputs(logits_to_keep=1).check({"input_ids"}, "BertModel")
            Traceback (most recent call last):
            ...
            ValueError: logits_to_keep is given, which BertModel does not take. Leave it out.
        """
        given = {name for name in ARRAYS if getattr(self, name) is not None}
        given |= {name for name, default in OPTIONS.items() if getattr(self, name) != default}
        if unknown := sorted(given - set(takes)):
            raise ValueError(f"{unknown[0]} is given, which {architecture} does not take. Leave it out.")


ARRAYS = tuple(field.name for field in dataclasses.fields(ForwardInputs) if field.default is None)
OPTIONS = {field.name: field.default for field in dataclasses.fields(ForwardInputs) if field.default is not None}
jax.tree_util.register_dataclass(ForwardInputs, data_fields=ARRAYS, meta_fields=tuple(OPTIONS))
