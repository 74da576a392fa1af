"""The configuration of GPT-NeoX and Pythia, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(RotaryConfig):
    """Architecture of a GPT-NeoX or a Pythia, with the fields of `transformers.GPTNeoXConfig`.

    Attributes:
        attention_bias: Whether the projections of attention have a bias.
        use_parallel_residual: Whether attention and feed-forward network stand side by side, or one behind the other.
        hidden_dropout: The probability with which embeddings and outputs of layers are dropped in training.

    Example:
        >>> GPTNeoXConfig.from_hf({"model_type": "gpt_neox", "rotary_pct": 0.5}).rope.partial_rotary_factor
        0.5
    """

    has_padding_row = False
    stems = MappingProxyType({"gpt_neox": "GPTNeoX"})
    tasks = tasks_of(
        "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"
    )
    partial = True
    lacking = MappingProxyType({"gpt_neox": ("head_dim", "num_key_value_heads")})

    model_type: str = "gpt_neox"
    vocab_size: int = 50432
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_bias: bool = True
    use_parallel_residual: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.hidden_dropout
        return super().rates._replace(embedding=out, attention_out=out, mlp_out=out)
