"""The configuration of Falcon, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models.config import head_rate
from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.rope_parameters import RopeParameters

SWITCHES = ("alibi", "new_decoder_architecture", "multi_query", "parallel_attn", "bias")


@dataclasses.dataclass(frozen=True)
class FalconConfig(RotaryConfig):
    """Architecture of a Falcon, with the common names of `transformers.FalconConfig`'s fields.

    Attributes:
        num_key_value_heads: ``num_kv_heads`` of config.json; the new architecture alone heeds it.
        alibi: Whether scores grow along the keys, in place of turns by positions.
        new_decoder_architecture: Whether queries share keys and values in groups (Falcon-40B and later).
        multi_query: Whether all queries share one key and value, in the old architecture.
        parallel_attn: Whether attention and feed-forward network stand side by side, or one behind the other.
        num_ln_in_parallel_attn: Norms before them, 1 or 2; None means 2 in the new architecture, 1 in the old one.
        bias: Whether projections have a bias.
        hidden_dropout: The probability with which outputs of layers are dropped in training.
        attention_dropout: The same of weights of the attention with ``alibi``, as in transformers, and of outputs of
            the attention without ``parallel_attn``.

    Example:
        >>> FalconConfig.from_hf({"model_type": "falcon"}).kv_heads
        1
    """

    has_padding_row = False
    stems = MappingProxyType({"falcon": "Falcon"})
    tasks = tasks_of(
        "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"
    )
    lacking = MappingProxyType({"falcon": ("head_dim",)})
    spelled = MappingProxyType(
        {"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "hidden_act": "activation"}
    )

    model_type: str = "falcon"
    vocab_size: int = 65024
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    num_ln_in_parallel_attn: int | None = None
    bias: bool = False
    hidden_dropout: float | None = 0.0
    attention_dropout: float | None = 0.0

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        super().check()
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("parallel_attn=False is not supported with new_decoder_architecture=True.")
        norms = self.num_ln_in_parallel_attn
        if norms not in ((None, 1, 2) if self.new_decoder_architecture else (None, 1)) and self.parallel_attn:
            raise ValueError(
                f"num_ln_in_parallel_attn={norms} is not supported with "
                f"new_decoder_architecture={self.new_decoder_architecture}."
            )
        if not (self.new_decoder_architecture or self.multi_query or self.given_heads == self.num_attention_heads):
            raise ValueError(
                f"num_kv_heads={self.given_heads} is not supported with multi_query=False, only "
                f"{self.num_attention_heads}, as many as num_attention_heads."
            )

    @property
    def given_heads(self) -> int:
        """num_key_value_heads, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return 1 if self.multi_query and not self.new_decoder_architecture else self.given_heads

    @property
    def two_norms(self) -> bool:
        """Whether attention and feed-forward network side by side have a norm each."""
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1

    @property
    def ropes(self) -> dict[str, RopeParameters | None]:
        """The rope of each kind of layer; None with ALiBi."""
        return dict.fromkeys(self.kinds, None if self.alibi else self.rope)

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        attention = self.attention_dropout or 0.0
        return DropoutRates(
            attention=attention if self.alibi else 0.0,
            attention_out=0.0 if self.parallel_attn else attention,
            mlp_out=self.hidden_dropout or 0.0,
            head=head_rate(self, self.classifier_dropout, self.hidden_dropout),
        )

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class; None stands for False."""
        return {**super().translated(full), **{name: bool(full[name]) for name in SWITCHES}}
