"""The configuration of Phi-3 and Phi-4, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class Phi3Config(WindowedConfig):
    """Architecture of a Phi-3, Phi-3.5, Phi-4 or Phi-4-mini, with the fields of `transformers.Phi3Config`.

    Attributes:
        original_max_position_embeddings: The length of pretraining, beyond which a long rope turns otherwise.
        resid_pdrop: The probability with which outputs of layers are dropped in training.
        embd_pdrop: Kept for saving: transformers does not use it either.

    Example:
        >>> Phi3Config.from_hf({"model_type": "phi3", "sliding_window": 2047}).kinds[0]
        'sliding_attention'
    """

    stems = MappingProxyType({"phi3": "Phi3"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    partial = True
    lacking = MappingProxyType({"phi3": ("head_dim", "layer_types")})

    model_type: str = "phi3"
    vocab_size: int = 32064
    rms_norm_eps: float = 1e-5
    original_max_position_embeddings: int = 4096
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return super().rates._replace(attention_out=self.resid_pdrop, mlp_out=self.resid_pdrop)

    @property
    def renewed_at(self) -> int | None:
        """original_max_position_embeddings, from which on a long rope turns all positions otherwise."""
        return self.original_max_position_embeddings if self.rope.rope_type == "longrope" else None
