"""The configuration of Qwen3.5's text model, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import field_names, not_none, present
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    FULL,
    LINEAR,
    SEQ_CLS,
    ModelConfig,
    as_class,
    check_kinds,
    entries,
    rarely_set,
    read_common,
    write_common,
)
from peft_jax.models.hf_config import as_dict, check_fixed, complete
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.rope_parameters import RopeParameters

TEXT, WHOLE = "qwen3_5_text", "qwen3_5"
STACKS = {FULL: "full", LINEAR: "linear"}
INTERVAL = 4  # transformers' default: of so many layers the last one attends
MROPE = ("mrope_section", "mrope_interleaved")  # how positions of images are turned; those of texts turn the same way


@dataclasses.dataclass(frozen=True)
class Qwen35Config(ModelConfig):
    """Architecture of Qwen3.5's text model.

    The fields are those of `transformers.Qwen3_5TextConfig`. The config of a checkpoint with images (`qwen3_5`) is read
    as that of its text model. Hashable, hence usable as a static argument of `jax.jit`.

    Attributes:
        num_key_value_heads: Heads of keys and values of full attention.
        head_dim: Features of a head of full attention.
        rope: How positions turn queries and keys of full attention; the default turns a quarter of the features.
        attention_bias: Whether the projections of full attention have a bias.
        linear_conv_kernel_dim: Tokens that the convolution of linear attention sees.
        linear_key_head_dim: Features of a query or key of linear attention.
        linear_value_head_dim: Features of a value of linear attention.
        linear_num_key_heads: Heads of queries and keys of linear attention.
        linear_num_value_heads: Heads of values of linear attention.
        layer_types: One of "linear_attention" and "full_attention" a layer; None means every fourth one is full.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> Qwen35Config(num_hidden_layers=8).kinds.count("full_attention")
        2
    """

    has_padding_row = True
    stems = MappingProxyType({TEXT: "Qwen3_5"})
    tasks = MappingProxyType(
        {
            CAUSAL_LM: "ForCausalLM",
            SEQ_CLS: "TextForSequenceClassification",
            FEATURE_EXTRACTION: "TextModel",
        }
    )
    fixed = MappingProxyType({"attn_output_gate": True})

    vocab_size: int = 248320
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    attention_bias: bool = False
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float | None = rarely_set(0.0)
    model_type: str = TEXT
    task_type: str = CAUSAL_LM

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.layer_types is None:
            numbers = range(1, self.num_hidden_layers + 1)
            kinds = tuple(LINEAR if number % INTERVAL else FULL for number in numbers)
            object.__setattr__(self, "layer_types", kinds)
        self.check()
        check_activation("hidden_act", self.hidden_act)
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many}={getattr(self, many)} is not a multiple of {few}={getattr(self, few)}.")
        check_kinds(self, self.kinds, (FULL, LINEAR))
        turned = int(self.head_dim * self.rope.partial_rotary_factor)
        if turned % 2 or turned == 0:
            raise ValueError(
                f"Rotary embeddings turn pairs of features, got head_dim={self.head_dim} with "
                f"partial_rotary_factor={self.rope.partial_rotary_factor}, which are {turned}."
            )

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return DropoutRates(attention=self.attention_dropout or 0.0)

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads."""
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """head_dim."""
        return self.head_dim

    @property
    def stacks(self) -> tuple[str, ...]:
        """The name of the stack that each layer is in."""
        return tuple(STACKS[kind] for kind in self.kinds)

    @property
    def no_shadow(self) -> str:
        """Why PEFT's SHADOW makes no small network of it."""
        return "whose first layers keep no keys and values, without which PEFT's small network fails"

    @property
    def linear_keys(self) -> int:
        """Features of all keys of a layer of linear attention."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_values(self) -> int:
        """Features of all values of a layer of linear attention."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        """Features that the convolution of linear attention sees: of queries, keys and values."""
        return 2 * self.linear_keys + self.linear_values

    @classmethod
    def from_hf(cls, hf: Any) -> Qwen35Config:
        """Read a Hugging Face config, of the text model or of the model with images.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.

        Example:
            >>> Qwen35Config.from_hf({"model_type": "qwen3_5", "text_config": {"num_hidden_layers": 8}}).kinds[3]
            'full_attention'
        """
        full = complete(_text_part(as_dict(hf)), cls.stems)
        check_fixed(full, cls.fixed)
        values = present(full, field_names(cls))
        rope = RopeParameters.from_hf(full["rope_parameters"], also=MROPE)
        kinds = tuple(full["layer_types"])
        return cls(**{**values, **read_common(cls, full), "rope": rope, "layer_types": kinds})

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture.

        Example:
            >>> config = Qwen35Config(num_hidden_layers=4)
            >>> Qwen35Config.from_hf(config.to_hf()) == config
            True
        """
        return {
            **entries(self, "rope"),
            **write_common(self),
            "rope_parameters": self.rope.to_hf(),
            "layer_types": list(self.kinds),
        }


@dataclasses.dataclass(frozen=True)
class Qwen35MultimodalConfig(Qwen35Config):
    """Architecture of the text part of a Qwen3.5 with images, whose modules have names of their own.

    A checkpoint that is written of it is that of a text model.

    Example:
        >>> Qwen35MultimodalConfig(num_hidden_layers=4).to_hf()["model_type"]
        'qwen3_5_text'
    """

    stems = MappingProxyType({WHOLE: "Qwen3_5"})
    tasks = MappingProxyType({CAUSAL_LM: "ForConditionalGeneration"})

    model_type: str = WHOLE

    @classmethod
    def from_hf(cls, hf: Any) -> Qwen35Config:  # type: ignore[override]  # transformers reads it as the text model
        """Read the text model of a Hugging Face config, as `Qwen35Config.from_hf`, whose names its modules get."""
        return Qwen35Config.from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json of a text model."""
        return as_class(self, Qwen35Config, model_type=TEXT).to_hf()


def _text_part(hf: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a config, as a config of its own."""
    if hf.get("model_type") != WHOLE:
        return hf
    own = as_dict(hf.get("text_config") or {})
    shared = not_none(present(hf, ("architectures", "quantization_config", "dtype")))
    of_the_head = not_none(present(hf, ("id2label", "label2id", "problem_type")))
    return {**shared, **own, **of_the_head, "model_type": TEXT}
