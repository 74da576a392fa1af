"""Base classes of the configurations of decoders with rotary positions, for what most of them have alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    FULL,
    QUESTION_ANS,
    SEQ_CLS,
    SLIDING,
    SUFFIXES,
    TOKEN_CLS,
    ModelConfig,
    check_expressible,
    check_kinds,
    entries,
    head_rate,
    rarely_set,
    read_common,
    write_common,
)
from peft_jax.models.hf_config import check_fixed, complete
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.rope_parameters import RopeParameters


def tasks_of(*suffixes: str) -> Mapping[str, str]:
    """The tasks of a family whose classes in transformers have names that end so.

    Example:
        >>> dict(tasks_of("ForCausalLM", "Model"))
        {'CAUSAL_LM': 'ForCausalLM', 'FEATURE_EXTRACTION': 'Model'}
    """
    return MappingProxyType({SUFFIXES[suffix]: suffix for suffix in suffixes})


HEAD_NAMES = MappingProxyType({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score", QUESTION_ANS: "qa_outputs"})


def heads_of(tasks: Mapping[str, str]) -> dict[str, str]:
    """The names of transformers' heads of these tasks; a bare model has none."""
    return {task: HEAD_NAMES[task] for task in tasks if task != FEATURE_EXTRACTION}


@dataclasses.dataclass(frozen=True)
class RotaryConfig(ModelConfig):
    """Architecture of a decoder with rotary positions and grouped key/value heads, all of whose layers see all.

    A subclass names its classes in transformers, as for `ModelConfig`, and adds the fields that it has beside these.

    Attributes:
        num_key_value_heads: Heads of keys and values; None means num_attention_heads.
        head_dim: Features of a head; None means hidden_size // num_attention_heads.
        hidden_act: transformers' name of the activation.
        rope: How positions turn queries and keys.
        attention_dropout: The probability with which weights of the attention are dropped in training.
        classifier_dropout: The same of inputs of a token classifier's head; None means transformers' 0.1.

    Raises:
        ValueError: A field has a value that the family does not support, named in the message.
    """

    has_padding_row = True  # as nearly all of them have
    partial: ClassVar[bool] = False  # whether a rope may turn a part of a head's features
    lacking: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})  # our fields that a model type lacks

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope: RopeParameters = RopeParameters()
    model_type: str = ""
    task_type: str = CAUSAL_LM
    attention_dropout: float | None = rarely_set(0.0)
    classifier_dropout: float | None = rarely_set(None)

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        self.check()

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        super().check()
        check_activation("hidden_act", self.hidden_act)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        for rope in self.ropes.values():
            if rope is not None:
                self.check_rope(rope)

    def check_rope(self, rope: RopeParameters) -> None:
        """Raise ValueError if heads cannot be turned so."""
        factor = rope.partial_rotary_factor
        if factor != 1 and not self.partial:
            raise ValueError(f"partial_rotary_factor={factor} is not supported, only 1.0.")
        turned = int(self.head_size * factor)
        if turned % 2 or turned == 0:
            raise ValueError(
                f"Rotary embeddings turn pairs of features, got head_dim={self.head_size} with "
                f"partial_rotary_factor={factor}, which are {turned}."
            )

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """head_dim, never None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def ropes(self) -> dict[str, RopeParameters | None]:
        """The rope of each kind of layer; None for a kind that turns nothing."""
        return dict.fromkeys(self.kinds, self.rope)

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return DropoutRates(attention=self.attention_dropout or 0.0, head=head_rate(self, self.classifier_dropout))

    @property
    def window(self) -> int | None:
        """How many positions (its own included) a token of a sliding layer sees; None if there is no such layer."""
        return None

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.
        """
        full = complete(hf, cls.stems)
        if full.get("is_causal") is False:
            raise ValueError("is_causal=False (attention in both directions) is not supported.")
        check_fixed(full, cls.fixed)
        lacking = cls.lacking.get(full["model_type"], ())
        if "head_dim" in lacking and full.get("head_dim") is not None:
            raise ValueError(f"head_dim={full['head_dim']} is not supported, only hidden_size / num_attention_heads.")
        names = {field.name: cls.spelled.get(field.name, field.name) for field in dataclasses.fields(cls)}
        values = {ours: full[theirs] for ours, theirs in names.items() if theirs in full and ours not in lacking}
        return cls(**{**values, **read_common(cls, full), **cls.translated(full)})

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that config.json has in another form, from all fields of one; `written` is the inverse."""
        return {"rope": RopeParameters.from_hf(full["rope_parameters"])}

    def written(self) -> dict[str, Any]:
        """The entries of config.json for what `translated` reads."""
        parameters = self.rope.to_hf()
        if self.partial:  # transformers has another default than 1 for such models
            parameters["partial_rotary_factor"] = self.rope.partial_rotary_factor
        return {"rope_parameters": parameters}

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture.

        Raises:
            ValueError: No class of transformers has this combination of fields.
        """
        hf = entries(self, "rope", *self.lacking.get(self.model_type, ()))
        hf |= {**write_common(self), **self.written()}
        check_expressible(self, hf, "fields")
        return hf


@dataclasses.dataclass(frozen=True)
class WindowedConfig(RotaryConfig):
    """Architecture of a decoder with rotary positions, some of whose layers may see a window.

    Attributes:
        sliding_window: How many positions (its own included) a token of a sliding layer sees, None for all.
        layer_types: One of "full_attention" and "sliding_attention" a layer; None means what `default_types` says.
    """

    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", self.default_types())
        super().__post_init__()

    def default_types(self) -> tuple[str, ...]:
        """The layer_types of a config that names none."""
        kind = FULL if self.sliding_window is None else SLIDING
        return (kind,) * self.num_hidden_layers

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        check_kinds(self, self.layer_types or (), (FULL, SLIDING))
        if SLIDING in (self.layer_types or ()) and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r} layers, but sliding_window is None. Set sliding_window.")
        super().check()

    @property
    def window(self) -> int | None:
        """sliding_window."""
        return self.sliding_window

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class, with the kinds of layers."""
        if "layer_types" in cls.lacking.get(full["model_type"], ()):
            return super().translated(full)
        return {**super().translated(full), "layer_types": tuple(full["layer_types"])}

    def written(self) -> dict[str, Any]:
        """As the base class, with the kinds of layers."""
        if "layer_types" in self.lacking.get(self.model_type, ()):
            return super().written()
        return {**super().written(), "layer_types": list(self.layer_types or ())}
