"""The configuration of Mixtral, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.mixture_config import MixtureConfig


@dataclasses.dataclass(frozen=True)
class MixtralConfig(MixtureConfig):
    """Architecture of a Mixtral, with the fields of `transformers.MixtralConfig`.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> MixtralConfig.from_hf({"model_type": "mixtral", "num_local_experts": 4}).num_experts
        4
    """

    stems = MappingProxyType({"mixtral": "Mixtral"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    spelled = MappingProxyType({"num_experts": "num_local_experts"})
    lacking = MappingProxyType({"mixtral": ("layer_types",)})
    fixed = MappingProxyType({"router_jitter_noise": 0.0})

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    model_type: str = "mixtral"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    rms_norm_eps: float = 1e-5

    def written(self) -> dict[str, Any]:
        """As the base class, without the usual head_dim, which transformers leaves out."""
        written = super().written()
        usual = self.hidden_size // self.num_attention_heads
        return {**written, "head_dim": None if self.head_dim == usual else self.head_dim}
