"""The configuration of Gemma 1 to 3, with the field names of Hugging Face transformers."""

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
    SEQ_CLS,
    SLIDING,
    TOKEN_CLS,
    ModelConfig,
    as_class,
    check_expressible,
    check_kinds,
    entries,
    head_rate,
    rarely_set,
    read_common,
    write_common,
)
from peft_jax.models.hf_config import complete, text_part
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.logits_form import LogitsForm
from peft_jax.models.modules.rope_parameters import RopeParameters, ropes_by_kind, ropes_to_hf

FIRST, SECOND, THIRD, MULTIMODAL = "gemma", "gemma2", "gemma3_text", "gemma3"
EVERY = {FIRST: 1, SECOND: 2, THIRD: 6, MULTIMODAL: 6}  # one layer in so many is full


@dataclasses.dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """Architecture of a Gemma 1 or 2, or of the text model of a Gemma 3.

    The fields are those of `transformers.GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig`; the model type says which
    norms there are.

    Attributes:
        ropes: How positions turn, by kind of layer.
        query_pre_attn_scalar: Scores are divided by its root; None means head_dim (Gemma 1).
        sliding_window: How many positions (its own included) a token of a sliding layer sees.
        layer_types: One of "full_attention" and "sliding_attention" a layer; None means as the published models.
        final_logit_softcapping: The cap of the logits; None for none.
        attn_logit_softcapping: The cap of the scores; None for none. Gemma 3 has the field and does not use it.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> GemmaConfig(model_type="gemma2", num_hidden_layers=2).kinds
        ('sliding_attention', 'full_attention')
    """

    has_padding_row = True
    stems = MappingProxyType({FIRST: "Gemma", SECOND: "Gemma2", THIRD: "Gemma3"})
    tasks = MappingProxyType(
        {
            CAUSAL_LM: "ForCausalLM",
            SEQ_CLS: "ForSequenceClassification",
            TOKEN_CLS: "ForTokenClassification",
            FEATURE_EXTRACTION: "Model",
        }
    )

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    model_type: str = FIRST
    task_type: str = CAUSAL_LM
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    ropes: tuple[tuple[str, RopeParameters | None], ...] = ((FULL, RopeParameters()), (SLIDING, RopeParameters()))
    attention_bias: bool = False
    query_pre_attn_scalar: float | None = None
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float | None = rarely_set(0.0)
    classifier_dropout: float | None = rarely_set(None)
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        if self.layer_types is None:
            every = EVERY[self.model_type]
            types = tuple(SLIDING if (i + 1) % every else FULL for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types)
        if self.task_type == TOKEN_CLS and self.model_type == THIRD:
            raise ValueError(f"A {THIRD} model for {TOKEN_CLS} is not supported: transformers has no class for it.")
        check_activation("hidden_activation", self.hidden_activation)
        check_kinds(self, self.kinds, (FULL, SLIDING))
        if SLIDING in self.kinds and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r} layers, but sliding_window is None. Set sliding_window.")
        for kind, rope in self.ropes:
            if rope is not None and rope.partial_rotary_factor != 1:
                raise ValueError(
                    f"partial_rotary_factor={rope.partial_rotary_factor} of {kind} layers is not supported, only 1.0."
                )

    @property
    def architecture(self) -> str:
        """Name of the class in transformers."""
        stem = "Gemma3Text" if self.model_type == THIRD and self.task_type != CAUSAL_LM else self.stems[self.model_type]
        return stem + self.tasks[self.task_type]

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return DropoutRates(attention=self.attention_dropout or 0.0, head=head_rate(self, self.classifier_dropout))

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim

    @property
    def embedding_scale(self) -> float:
        """The factor of the embeddings of tokens where they are looked up."""
        return float(self.hidden_size**0.5)

    @property
    def logits_form(self) -> LogitsForm:
        """The form of a language model's logits, from the products of its head."""
        return LogitsForm(cap=self.final_logit_softcapping)

    @property
    def sandwiched(self) -> bool:
        """Whether the outputs of attention and feed-forward network are normalised too."""
        return self.model_type != FIRST

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.model_type in (THIRD, MULTIMODAL)

    @property
    def scale(self) -> float:
        """The factor of products of queries and keys."""
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    @classmethod
    def from_hf(cls, hf: Any) -> GemmaConfig:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.

        Example:
            >>> GemmaConfig.from_hf({"model_type": "gemma2", "num_hidden_layers": 2}).final_logit_softcapping
            30.0
        """
        full = complete(hf, cls.stems)
        kind = full["model_type"]
        if full.get("use_bidirectional_attention"):
            raise ValueError(
                f"use_bidirectional_attention={full['use_bidirectional_attention']!r} (attention in both directions) "
                "is not supported."
            )
        if kind == FIRST:
            full["hidden_activation"] = full["hidden_act"]
            full |= {"sliding_window": None, "layer_types": [FULL] * full["num_hidden_layers"]}
        if kind == THIRD:
            full["attn_logit_softcapping"] = None  # transformers reads the field and does not use it
        fields = without(present(full, field_names(cls)), ["ropes"])
        ropes = ropes_by_kind(full["rope_parameters"], set(full["layer_types"]))
        fields |= {"layer_types": tuple(full["layer_types"]), "ropes": tuple(ropes.items())}
        return cls(**{**fields, **read_common(cls, full)})

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture.

        Raises:
            ValueError: No Hugging Face class of this model_type has this combination of fields.

        Example:
            >>> config = GemmaConfig.from_hf({"model_type": "gemma3_text"})
            >>> GemmaConfig.from_hf(config.to_hf()) == config
            True
        """
        hf = entries(self, "ropes") | write_common(self)
        hf["layer_types"] = list(self.kinds)
        hf["rope_parameters"] = ropes_to_hf(dict(self.ropes), nested=self.model_type == THIRD)
        if self.model_type == FIRST:
            hf["hidden_act"] = hf.pop("hidden_activation")
            for name in ("query_pre_attn_scalar", "sliding_window", "layer_types"):
                del hf[name]
            del hf["final_logit_softcapping"], hf["attn_logit_softcapping"]
        check_expressible(self, hf, "windows, caps and ropes")
        return hf


@dataclasses.dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """Architecture of the text part of a multimodal Gemma 3, whose modules have names of their own.

    A checkpoint that is written of it is that of a text model.

    Example:
        >>> Gemma3Config.from_hf({"model_type": "gemma3", "text_config": {"hidden_size": 64}}).hidden_size
        64
    """

    stems = MappingProxyType({MULTIMODAL: "Gemma3"})
    tasks = MappingProxyType({CAUSAL_LM: "ForConditionalGeneration"})

    model_type: str = MULTIMODAL

    @classmethod
    def from_hf(cls, hf: Any) -> Gemma3Config:
        """Read a Hugging Face config; arguments and errors are those of `GemmaConfig.from_hf`."""
        text = GemmaConfig.from_hf(text_part(hf, MULTIMODAL, THIRD))
        return as_class(text, cls, model_type=MULTIMODAL, task_type=CAUSAL_LM)

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json of a text model."""
        return as_class(self, GemmaConfig, model_type=THIRD).to_hf()
