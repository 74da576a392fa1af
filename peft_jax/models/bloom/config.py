"""The configuration of BLOOM, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.config import CAUSAL_LM, ModelConfig
from peft_jax.models.decoder_config import tasks_of


@dataclasses.dataclass(frozen=True)
class BloomConfig(ModelConfig):
    """Architecture of a BLOOM, with the common names of `transformers.BloomConfig`'s fields.

    Attributes:
        max_position_embeddings: The length of pretraining, that of all published ones; numbers do not depend on it.
        apply_residual_connection_post_layernorm: Whether a layer adds to its normalised input.
        pretraining_tp: Kept for saving; it matters with ``slow_but_exact`` alone, which leaves out biases.
        hidden_dropout: Kept for saving, as the other dropout.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> BloomConfig.from_hf({"model_type": "bloom", "n_embed": 64, "n_head": 4}).head_size
        16
    """

    stems = MappingProxyType({"bloom": "Bloom"})
    tasks = tasks_of(
        "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"
    )
    spelled = MappingProxyType({"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"})
    fixed = MappingProxyType({"slow_but_exact": False})

    vocab_size: int = 250880
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    max_position_embeddings: int = 2048
    model_type: str = "bloom"
    task_type: str = CAUSAL_LM
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    pretraining_tp: int = 1

    def __post_init__(self) -> None:
        self.check()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of n_head={self.num_attention_heads}, "
                "which it must be."
            )
