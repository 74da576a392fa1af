"""The configuration of BLOOM, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import CAUSAL_LM, ModelConfig, head_rate, rarely_set
from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class BloomConfig(ModelConfig):
    """Architecture of a BLOOM, with the common names of `transformers.BloomConfig`'s fields.

    Attributes:
        max_position_embeddings: The length of pretraining, that of all published ones; numbers do not depend on it.
        apply_residual_connection_post_layernorm: Whether a layer adds to its normalised input.
        pretraining_tp: Kept for saving; it matters with ``slow_but_exact`` alone, which leaves out biases.
        hidden_dropout: The probability with which outputs of layers are dropped in training.
        attention_dropout: The same of weights of the attention.
        classifier_dropout: The same of inputs of a token classifier's head; None means hidden_dropout.

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
    classifier_dropout: float | None = rarely_set(None)

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of n_head={self.num_attention_heads}, "
                "which it must be."
            )

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.hidden_dropout
        head = head_rate(self, self.classifier_dropout, out)
        return DropoutRates(attention=self.attention_dropout, attention_out=out, mlp_out=out, head=head)
