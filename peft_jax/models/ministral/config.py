"""The configuration of Ministral and Ministral 3, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models.config import QUESTION_ANS
from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.rope_parameters import RopeParameters

FIRST, THIRD = "ministral", "ministral3"
BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"  # entries of rope_parameters


@dataclasses.dataclass(frozen=True)
class MinistralConfig(WindowedConfig):
    """Architecture of a Ministral, with the fields of `transformers.MinistralConfig` and `Ministral3Config`.

    Attributes:
        growth: By how much queries grow with the logarithm of their position; 0 for not at all (Ministral).
        growth_from: The position that they grow from, and the length of a step.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> MinistralConfig.from_hf({"model_type": "ministral3"}).growth
        0.1
    """

    stems = MappingProxyType({FIRST: "Ministral", THIRD: "Ministral3"})
    tasks = tasks_of(
        "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"
    )
    lacking = MappingProxyType({FIRST: ("growth", "growth_from"), THIRD: ("layer_types", "growth", "growth_from")})

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    model_type: str = FIRST
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    rms_norm_eps: float = 1e-6
    growth: float = 0.0
    growth_from: int = 0

    @property
    def own_backbone(self) -> str | None:
        """The module that holds all but the head, where it is not ``model``."""
        return "transformer" if self.task_type == QUESTION_ANS and self.model_type == FIRST else None

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class, with the growth of queries among the parameters of the rope."""
        if full["model_type"] == FIRST:
            return super().translated(full)
        parameters = full["rope_parameters"]
        for name in (BETA, LENGTH):
            if parameters.get(name) is None:
                raise ValueError(f"rope_parameters without {name} are not supported for {THIRD}. Give it a number.")
        rope = RopeParameters.from_hf(parameters, (BETA, "max_position_embeddings"))
        return {"rope": rope, "growth": parameters[BETA], "growth_from": parameters[LENGTH]}

    def written(self) -> dict[str, Any]:
        """The inverse of `translated`."""
        hf = super().written()
        if self.model_type == THIRD:
            hf["rope_parameters"] |= {BETA: self.growth, LENGTH: self.growth_from}
        return hf
