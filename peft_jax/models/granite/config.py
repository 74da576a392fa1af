"""The configuration of Granite, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import RotaryConfig, tasks_of
from peft_jax.models.modules.logits_form import LogitsForm


@dataclasses.dataclass(frozen=True)
class GraniteConfig(RotaryConfig):
    """Architecture of a dense Granite, with the fields of `transformers.GraniteConfig`.

    Attributes:
        attention_bias: Whether the projections of attention have a bias.
        mlp_bias: Whether those of the feed-forward network have one.
        embedding_multiplier: The factor of the embeddings, also of those that are given in place of ids.
        attention_multiplier: The factor of products of queries and keys.
        residual_multiplier: The factor of what a layer adds to the residual stream.
        logits_scaling: What logits are divided by.

    Example:
        >>> GraniteConfig.from_hf({"model_type": "granite", "attention_multiplier": 0.0078125}).attention_multiplier
        0.0078125
    """

    stems = MappingProxyType({"granite": "Granite"})
    tasks = tasks_of("ForCausalLM", "Model")

    model_type: str = "granite"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @property
    def logits_form(self) -> LogitsForm:
        """The form of a language model's logits, from the products of its head."""
        return LogitsForm(scale=1 / self.logits_scaling)
