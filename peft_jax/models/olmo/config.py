"""The configuration of OLMo 2 and 3, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import FULL, SLIDING
from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.rope_parameters import RopeParameters, ropes_by_kind, ropes_to_hf

SECOND, THIRD = "olmo2", "olmo3"


@dataclasses.dataclass(frozen=True)
class OlmoConfig(WindowedConfig):
    """Architecture of an OLMo 2 or 3, with the fields of `transformers.Olmo2Config` and `Olmo3Config`.

    Attributes:
        rope: How positions turn queries and keys of full layers.
        sliding_rope: How they do in sliding layers; None means as in full ones.
        attention_bias: Whether the projections of attention have a bias.

    Example:
        >>> OlmoConfig.from_hf({"model_type": "olmo3", "num_hidden_layers": 4}).kinds[2:]
        ('sliding_attention', 'full_attention')
    """

    stems = MappingProxyType({SECOND: "Olmo2", THIRD: "Olmo3"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "Model")
    lacking = MappingProxyType({SECOND: ("sliding_window", "layer_types", "sliding_rope"), THIRD: ("sliding_rope",)})

    vocab_size: int = 50304
    model_type: str = SECOND
    pad_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 50279
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    sliding_rope: RopeParameters | None = None

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.sliding_rope is None:
            object.__setattr__(self, "sliding_rope", self.rope)
        super().__post_init__()

    @property
    def ropes(self) -> dict[str, RopeParameters | None]:
        """The rope of each kind of layer."""
        return {FULL: self.rope, SLIDING: self.sliding_rope}

    def default_types(self) -> tuple[str, ...]:
        """Every fourth layer of an OLMo 3 is full."""
        if self.sliding_window is None:
            return (FULL,) * self.num_hidden_layers
        return tuple(SLIDING if (i + 1) % 4 else FULL for i in range(self.num_hidden_layers))

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class; OLMo 3 has a rope for each kind of layer."""
        if full["model_type"] == SECOND:
            return super().translated(full)
        parameters = full["rope_parameters"]
        surplus = sorted(parameters.keys() - {FULL, SLIDING})
        if surplus:
            raise ValueError(
                f"rope_parameters {surplus} of all layers are not supported. "
                f"Give them by kind of layer, as {FULL!r} and {SLIDING!r}."
            )
        ropes = ropes_by_kind(parameters, (FULL, SLIDING))
        return {
            "rope": ropes[FULL],
            "sliding_rope": ropes[SLIDING],
            "layer_types": tuple(full["layer_types"]),
        }

    def written(self) -> dict[str, Any]:
        """The inverse of `translated`."""
        if self.model_type == SECOND:
            return super().written()
        return {**super().written(), "rope_parameters": ropes_to_hf(self.ropes, nested=True)}
