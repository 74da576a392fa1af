"""The configuration of SmolLM3, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import picked
from peft_jax.models.config import FULL, QUESTION_ANS, SLIDING
from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.rope_parameters import RopeParameters

STILL = {FULL: "full_without_rope", SLIDING: "sliding_without_rope"}  # kinds of layers that turn nothing


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(WindowedConfig):
    """Architecture of a SmolLM3, with the fields of `transformers.SmolLM3Config`.

    Attributes:
        no_rope_layers: 1 for a layer whose queries and keys are turned, 0 for another; None means every fourth is not.
        attention_bias: Whether the projections of attention have a bias.
        mlp_bias: Whether those of the feed-forward network have one.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> SmolLM3Config(num_hidden_layers=4).kinds[2:]
        ('full_attention', 'full_without_rope')
    """

    stems = MappingProxyType({"smollm3": "SmolLM3"})
    tasks = tasks_of(
        "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"
    )

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope: RopeParameters = RopeParameters(rope_theta=2e6)
    model_type: str = "smollm3"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001
    pad_token_id: int | None = 128004
    rms_norm_eps: float = 1e-6
    no_rope_layers: tuple[int, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.no_rope_layers is None:
            turned = tuple(int((i + 1) % 4 != 0) for i in range(self.num_hidden_layers))
            object.__setattr__(self, "no_rope_layers", turned)
        super().__post_init__()

    @property
    def own_backbone(self) -> str | None:
        """The module that holds all but the head, where it is not ``model``."""
        return "transformer" if self.task_type == QUESTION_ANS else None

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        turned = self.no_rope_layers or ()
        if len(turned) != self.num_hidden_layers or not set(turned) <= {0, 1}:
            raise ValueError(
                f"no_rope_layers must be 0 or 1 for each of {self.num_hidden_layers} layers, got {turned}."
            )
        super().check()

    def default_types(self) -> tuple[str, ...]:
        """Layers that turn nothing are sliding, where there is a window."""
        turned = self.no_rope_layers or ()
        windowed = self.sliding_window is not None
        return tuple(SLIDING if windowed and not one else FULL for one in turned)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer: what it sees, and whether it turns queries and keys."""
        pairs = zip(self.layer_types or (), self.no_rope_layers or (), strict=True)
        return tuple(kind if turned else STILL[kind] for kind, turned in pairs)

    @property
    def ropes(self) -> dict[str, RopeParameters | None]:
        """The rope of each kind of layer; None for a kind that turns nothing."""
        return {kind: None if kind in STILL.values() else self.rope for kind in self.kinds}

    def with_layers(self, order: Sequence[int]) -> Self:
        """The architecture whose layers, and their kinds, are those of ``order``."""
        types, turned = self.layer_types or (), self.no_rope_layers or ()
        return dataclasses.replace(
            self,
            num_hidden_layers=len(order),
            layer_types=picked(types, order),
            no_rope_layers=picked(turned, order),
        )

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class, with the layers that turn nothing; transformers allows a list that is too long."""
        turned = full["no_rope_layers"][: full["num_hidden_layers"]]
        return {**super().translated(full), "no_rope_layers": tuple(int(one) for one in turned)}

    def written(self) -> dict[str, Any]:
        """The inverse of `translated`."""
        more = {
            "no_rope_layers": list(self.no_rope_layers or ()),
            "use_sliding_window": self.sliding_window is not None,
        }
        return {**super().written(), **more}
