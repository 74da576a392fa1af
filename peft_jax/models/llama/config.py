"""The configuration of the Llama family, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import field_names, present, without
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    FULL,
    NO_ENTRIES,
    QUESTION_ANS,
    SEQ_CLS,
    SLIDING,
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
from peft_jax.models.hf_config import complete
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.rope_parameters import RopeParameters

RopeScaling = RopeParameters  # what this family calls it


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Architecture of a decoder of the Llama family: Llama 1 to 3, Mistral, Qwen2 and Qwen3.

    The fields are those of `transformers.LlamaConfig`, `MistralConfig`, `Qwen2Config` and `Qwen3Config`; what differs
    between these is spelled out by the last five. Hashable, hence usable as a static argument of `jax.jit`.

    Attributes:
        num_key_value_heads: None means num_attention_heads.
        head_dim: None means hidden_size // num_attention_heads.
        rope_theta: The base of the rotary frequencies.
        rope_scaling: How they are stretched; its own base stays at the default.
        attention_bias: Whether q_proj, k_proj and v_proj have a bias.
        attention_out_bias: Whether o_proj has one (None means as attention_bias; Qwen2: True and False).
        qk_norm: Whether queries and keys are normalised per head (Qwen3).
        sliding_window: How many positions (its own included) a token of a sliding layer sees, None for all.
        layer_types: One of "full_attention" and "sliding_attention" a layer; None means sliding in all layers when
            sliding_window is set (Mistral), else full.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> config.head_dim
        8
    """

    has_padding_row = True
    stems = MappingProxyType({"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"})
    tasks = MappingProxyType(
        {
            CAUSAL_LM: "ForCausalLM",
            SEQ_CLS: "ForSequenceClassification",
            TOKEN_CLS: "ForTokenClassification",
            QUESTION_ANS: "ForQuestionAnswering",
            FEATURE_EXTRACTION: "Model",
        }
    )

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    model_type: str = "llama"
    task_type: str = CAUSAL_LM
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float | None = rarely_set(0.0)
    classifier_dropout: float | None = rarely_set(None)

    def __post_init__(self) -> None:
        check_fields_of(self)
        _default(self, "num_key_value_heads", self.num_attention_heads)
        _default(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _default(self, "attention_out_bias", self.attention_bias)
        kind = FULL if self.sliding_window is None else SLIDING
        _default(self, "layer_types", (kind,) * self.num_hidden_layers)
        self.check()
        if self.rope_scaling.rope_theta != RopeScaling.rope_theta:
            raise ValueError(
                f"rope_scaling has rope_theta={self.rope_scaling.rope_theta}. Give it as rope_theta= of the config."
            )
        check_activation("hidden_act", self.hidden_act)
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_size % 2:
            raise ValueError(f"Rotary embeddings need an even head_dim, got head_dim={self.head_dim}.")
        check_kinds(self, self.kinds, (FULL, SLIDING))
        if SLIDING in self.kinds and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r} layers, but sliding_window is None. Set sliding_window.")

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return DropoutRates(attention=self.attention_dropout or 0.0, head=head_rate(self, self.classifier_dropout))

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, never None."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """head_dim, never None."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> RopeParameters:
        """How positions turn queries and keys."""
        return dataclasses.replace(self.rope_scaling, rope_theta=self.rope_theta)

    @property
    def own_backbone(self) -> str | None:
        """The module that holds all but the head, where it is not ``model``."""
        is_other = self.task_type == QUESTION_ANS and self.model_type != "mistral"
        return "transformer" if is_other else None

    @classmethod
    def from_hf(cls, hf: Any) -> LlamaConfig:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.

        Example:
            >>> LlamaConfig.from_hf({"model_type": "qwen3", "num_hidden_layers": 2}).qk_norm
            True
        """
        full = complete(hf, cls.stems)
        kind = full["model_type"]
        if full.get("is_causal") is False:
            raise ValueError("is_causal=False (attention in both directions) is not supported.")
        scaling = RopeParameters.from_hf(full["rope_parameters"])
        if scaling.partial_rotary_factor != 1:
            raise ValueError(f"partial_rotary_factor={scaling.partial_rotary_factor} is not supported, only 1.0.")
        fields = without(present(full, field_names(cls)), _TRANSLATED)
        windowed = kind != "llama"  # transformers' Llama has no window, whatever its config says
        return cls(
            **{**fields, **read_common(cls, full)},
            rope_theta=scaling.rope_theta,
            rope_scaling=dataclasses.replace(scaling, rope_theta=RopeScaling.rope_theta),
            attention_bias=kind == "qwen2" or (kind != "mistral" and bool(full.get("attention_bias"))),
            attention_out_bias=kind not in ("qwen2", "mistral") and bool(full.get("attention_bias")),
            mlp_bias=kind == "llama" and bool(full.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            sliding_window=full.get("sliding_window") if windowed else None,
            layer_types=tuple(full["layer_types"]) if kind in ("qwen2", "qwen3") else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture.

        Raises:
            ValueError: No Hugging Face class of this model_type has this combination of fields.

        Example:
            >>> config = LlamaConfig(num_hidden_layers=2)
            >>> LlamaConfig.from_hf(config.to_hf()) == config
            True
        """
        hf = entries(self, *_NOT_IN_HF)
        hf["rope_parameters"] = self.rope.to_hf()
        hf |= write_common(self)
        if self.model_type in ("qwen2", "qwen3"):
            hf["layer_types"] = list(self.kinds)
            hf["use_sliding_window"] = self.sliding_window is not None
        else:
            del hf["layer_types"]
        check_expressible(self, hf, "biases, q/k norms and windows")
        return hf


_NOT_IN_HF = {"rope_theta", "rope_scaling", "attention_out_bias", "qk_norm"}
_TRANSLATED = {*_NOT_IN_HF, *NO_ENTRIES} | {
    "model_type",
    "eos_token_id",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "layer_types",
}


def _default(config: LlamaConfig, name: str, value: Any) -> None:
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)
