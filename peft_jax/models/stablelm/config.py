"""The configuration of StableLM, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.config import head_rate, rarely_set
from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.rope_parameters import RopeParameters


@dataclasses.dataclass(frozen=True)
class StableLmConfig(RotaryConfig):
    """Architecture of a StableLM, with the fields of `transformers.StableLmConfig`.

    Attributes:
        use_qkv_bias: Whether the projections to queries, keys and values have a bias.
        qk_layernorm: Whether queries and keys are normalised, each head by its own norm.
        use_parallel_residual: Whether attention and feed-forward network are side by side.
        hidden_dropout: The probability with which outputs of the feed-forward network are dropped in training.

    Example:
        >>> StableLmConfig.from_hf({"model_type": "stablelm"}).rope.partial_rotary_factor
        0.25
    """

    stems = MappingProxyType({"stablelm": "StableLm"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    lacking = MappingProxyType({"stablelm": ("head_dim",)})
    partial = True

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    max_position_embeddings: int = 4096
    rope: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    model_type: str = "stablelm"
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    layer_norm_eps: float = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    hidden_dropout: float = rarely_set(0.0)

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        # transformers' classifier of tokens takes the rate of layers for its own.
        head = head_rate(self, self.classifier_dropout, self.hidden_dropout)
        return DropoutRates(attention=self.attention_dropout or 0.0, mlp_out=self.hidden_dropout, head=head)
