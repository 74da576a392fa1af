"""The configuration of Phi-1 to Phi-2, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class PhiConfig(RotaryConfig):
    """Architecture of a Phi-1, Phi-1.5 or Phi-2, with the fields of `transformers.PhiConfig`.

    Attributes:
        qk_layernorm: Whether queries and keys are normalised per head.
        resid_pdrop: The probability with which outputs of layers are dropped in training.
        embd_pdrop: The same of embeddings.

    Example:
        >>> PhiConfig.from_hf({"model_type": "phi"}).rope.partial_rotary_factor
        0.5
    """

    stems = MappingProxyType({"phi": "Phi"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    fixed = MappingProxyType({"tie_word_embeddings": False})  # its head has a bias
    partial = True
    lacking = MappingProxyType({"phi": ("head_dim",)})

    model_type: str = "phi"
    vocab_size: int = 51200
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    qk_layernorm: bool = False
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float | None = 0.0

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.resid_pdrop
        return super().rates._replace(embedding=self.embd_pdrop, attention_out=out, mlp_out=out)
