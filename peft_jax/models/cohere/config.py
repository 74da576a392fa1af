"""The configuration of Cohere's models, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.config import FULL, SLIDING
from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.logits_form import LogitsForm
from peft_jax.models.modules.rope_parameters import RopeParameters

FIRST, SECOND = "cohere", "cohere2"


@dataclasses.dataclass(frozen=True)
class CohereConfig(WindowedConfig):
    """Architecture of a Command R, with the fields of `transformers.CohereConfig` and `Cohere2Config` (Command R7B).

    Sliding layers of the second turn queries and keys, its full layers do not.

    Attributes:
        attention_bias: Whether the projections of attention have a bias.
        use_qk_norm: Whether queries and keys are normalised, each head with a scale of its own.
        logit_scale: What logits are multiplied by.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> CohereConfig.from_hf({"model_type": "cohere2", "num_hidden_layers": 4}).ropes["full_attention"] is None
        True
    """

    stems = MappingProxyType({FIRST: "Cohere", SECOND: "Cohere2"})
    tasks = tasks_of("ForCausalLM", "Model")
    lacking = MappingProxyType({FIRST: ("sliding_window", "layer_types"), SECOND: ("use_qk_norm",)})

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    max_position_embeddings: int = 8192
    model_type: str = FIRST
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 5
    eos_token_id: int | tuple[int, ...] | None = 255001
    pad_token_id: int | None = 0
    layer_norm_eps: float = 1e-5
    attention_bias: bool = False
    use_qk_norm: bool = False
    logit_scale: float = 0.0625

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        super().check()
        if not isinstance(self.logit_scale, int | float):
            raise ValueError(f"logit_scale={self.logit_scale!r} is not supported, only a number.")

    @property
    def ropes(self) -> dict[str, RopeParameters | None]:
        """The rope of each kind of layer; None for a kind that turns nothing."""
        return {FULL: self.rope if self.model_type == FIRST else None, SLIDING: self.rope}

    @property
    def logits_form(self) -> LogitsForm:
        """The form of a language model's logits, from the products of its head."""
        return LogitsForm(scale=self.logit_scale)

    def default_types(self) -> tuple[str, ...]:
        """Every fourth layer is full, where there is a window."""
        if self.sliding_window is None:
            return (FULL,) * self.num_hidden_layers
        return tuple(SLIDING if (i + 1) % 4 else FULL for i in range(self.num_hidden_layers))
