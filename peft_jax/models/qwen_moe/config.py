"""The configuration of Qwen's mixtures of experts, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.mixture_config import SteppedMixtureConfig

SECOND, THIRD = "qwen2_moe", "qwen3_moe"


@dataclasses.dataclass(frozen=True)
class QwenMoeConfig(SteppedMixtureConfig):
    """Architecture of a Qwen with experts, with the fields of `transformers.Qwen2MoeConfig` and `Qwen3MoeConfig`.

    Attributes:
        shared_expert_intermediate_size: Features between the projections of the expert that all tokens go through
            (Qwen2-MoE).
        qkv_bias: Whether queries, keys and values have a bias (Qwen2-MoE).
        attention_bias: Whether all projections of attention have one (Qwen3-MoE).

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> config = QwenMoeConfig.from_hf({"model_type": "qwen3_moe", "num_hidden_layers": 2, "mlp_only_layers": [0]})
        >>> config.stacks
        ('dense', 'sparse')
    """

    stems = MappingProxyType({SECOND: "Qwen2Moe", THIRD: "Qwen3Moe"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    lacking = MappingProxyType(
        {
            SECOND: ("head_dim", "attention_bias"),
            THIRD: ("layer_types", "shared_expert_intermediate_size", "qkv_bias"),
        }
    )

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    model_type: str = THIRD
    rms_norm_eps: float = 1e-6
    num_experts: int = 128
    num_experts_per_tok: int = 8
    shared_expert_intermediate_size: int = 5632
    qkv_bias: bool = True
    attention_bias: bool = False

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class, with the names that transformers has for experts, and a window of 0 that is none."""
        experts = full.get("num_local_experts", full.get("num_experts"))
        return {**super().translated(full), "num_experts": experts, "sliding_window": full["sliding_window"] or None}

    def written(self) -> dict[str, Any]:
        """The inverse of `translated`."""
        return {**super().written(), "use_sliding_window": self.sliding_window is not None}
