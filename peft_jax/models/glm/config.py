"""The configuration of GLM-4 in both forms, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.rope_parameters import RopeParameters

FIRST, LATER = "glm", "glm4"


@dataclasses.dataclass(frozen=True)
class GlmConfig(RotaryConfig):
    """Architecture of a GLM-4, with the fields of `transformers.GlmConfig` (2024) and `Glm4Config` (2025).

    Attributes:
        attention_bias: Whether the projections to queries, keys and values have a bias.

    Example:
        >>> GlmConfig.from_hf({"model_type": "glm4"}).sandwiched
        True
    """

    stems = MappingProxyType({FIRST: "Glm", LATER: "Glm4"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    partial = True

    vocab_size: int = 151552
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_key_value_heads: int | None = 2
    head_dim: int | None = 128
    max_position_embeddings: int = 131072
    rope: RopeParameters = RopeParameters(partial_rotary_factor=0.5)
    model_type: str = FIRST
    eos_token_id: int | tuple[int, ...] | None = (151329, 151336, 151338)
    pad_token_id: int | None = 151329
    rms_norm_eps: float = 1.5625e-7
    attention_bias: bool = True

    @property
    def sandwiched(self) -> bool:
        """Whether the outputs of attention and feed-forward network are normalised too."""
        return self.model_type == LATER
