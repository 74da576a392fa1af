"""The configuration of gpt-oss, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.config import FULL, SLIDING
from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.mixture_config import MixtureConfig


@dataclasses.dataclass(frozen=True)
class GptOssConfig(MixtureConfig):
    """Architecture of a gpt-oss, with the fields of `transformers.GptOssConfig`.

    Attributes:
        attention_bias: Whether the projections of attention have a bias.
        swiglu_alpha: What gates are multiplied by within the sigmoid of an expert's activation.
        swiglu_limit: The largest value of gates, and the largest absolute value of what they are multiplied with.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> GptOssConfig.from_hf({"model_type": "gpt_oss", "num_hidden_layers": 2}).layer_types
        ('sliding_attention', 'full_attention')
    """

    stems = MappingProxyType({"gpt_oss": "GptOss"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    spelled = MappingProxyType({"num_experts": "num_local_experts"})

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    sliding_window: int | None = 128
    model_type: str = "gpt_oss"
    rms_norm_eps: float = 1e-5
    num_experts: int = 128
    num_experts_per_tok: int = 4
    attention_bias: bool = True
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def default_types(self) -> tuple[str, ...]:
        """The layer_types of a config that names none: every other layer sees all, the first one a window."""
        return tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
