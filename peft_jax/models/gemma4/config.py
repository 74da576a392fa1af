"""The configuration of Gemma 4's text model, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import field_names, present, without
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    FULL,
    SLIDING,
    ModelConfig,
    as_class,
    check_kinds,
    entries,
    rarely_set,
    read_common,
    write_common,
)
from peft_jax.models.hf_config import complete, text_part
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.modules.logits_form import LogitsForm
from peft_jax.models.modules.rope_parameters import RopeParameters, ropes_by_kind, ropes_to_hf

TEXT, MULTIMODAL = "gemma4_text", "gemma4"
SHORT = {FULL: "full", SLIDING: "sliding"}  # how the stacks of each kind are called
SHARING = "shared"  # added to the name of those that have no keys and values of their own


@dataclasses.dataclass(frozen=True)
class Gemma4Config(ModelConfig):
    """Architecture of the text model of a Gemma 4, with the fields of `transformers.Gemma4TextConfig`.

    Full and sliding layers have heads of unlike sizes, and the last layers may take the keys and values of the last
    layer of their kind that has its own. So the layers are up to four stacks.

    Attributes:
        head_dim: Features of a head of sliding layers.
        global_head_dim: Features of a head of full layers.
        num_global_key_value_heads: Heads of keys and values of full layers; None means num_key_value_heads.
        ropes: How positions turn, by kind of layer.
        sliding_window: How many positions (its own included) a token of a sliding layer sees.
        layer_types: One of "full_attention" and "sliding_attention" a layer; None means every sixth full, and the last.
        vocab_size_per_layer_input: Rows of the table of embeddings that each layer gets.
        hidden_size_per_layer_input: Features of these embeddings in each layer; 0 for none.
        attention_k_eq_v: Whether full layers make keys and values by one projection.
        num_kv_shared_layers: How many layers at the end take keys and values of others.
        use_double_wide_mlp: Whether these have a feed-forward network of twice the width.
        final_logit_softcapping: The cap of the logits; None for none.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> Gemma4Config(num_hidden_layers=6, num_kv_shared_layers=0).stacks[-2:]
        ('sliding', 'full')
    """

    has_padding_row = True
    stems = MappingProxyType({TEXT: "Gemma4"})
    tasks = MappingProxyType({CAUSAL_LM: "ForCausalLM", FEATURE_EXTRACTION: "TextModel"})

    vocab_size: int = 262144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    model_type: str = TEXT
    task_type: str = CAUSAL_LM
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    ropes: tuple[tuple[str, RopeParameters | None], ...] = (
        (FULL, RopeParameters("proportional", rope_theta=1e6, partial_rotary_factor=0.25)),
        (SLIDING, RopeParameters()),
    )
    attention_bias: bool = False
    sliding_window: int = 512
    layer_types: tuple[str, ...] | None = None
    attention_dropout: float | None = rarely_set(0.0)
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    final_logit_softcapping: float | None = None

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        if self.layer_types is None:
            types = [SLIDING if (i + 1) % 6 else FULL for i in range(self.num_hidden_layers)]
            types[-1] = FULL
            object.__setattr__(self, "layer_types", tuple(types))
        check_activation("hidden_activation", self.hidden_activation)
        check_kinds(self, self.kinds, (FULL, SLIDING))
        own = self.num_hidden_layers - self.num_kv_shared_layers
        if not set(self.kinds[own:]) <= set(self.kinds[:own]):
            raise ValueError(
                f"num_kv_shared_layers={self.num_kv_shared_layers} leaves a kind of layer without keys and values. "
                f"Write a smaller number; layer_types are {self.kinds}."
            )
        for kind, rope in self.ropes:
            if rope is not None and rope.rope_type != "proportional" and rope.partial_rotary_factor != 1:
                raise ValueError(
                    f"partial_rotary_factor={rope.partial_rotary_factor} of {kind} layers is not supported with "
                    f"rope_type={rope.rope_type!r}, only 1.0."
                )

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        return DropoutRates(attention=self.attention_dropout or 0.0)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a sliding layer."""
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Features of a head of a sliding layer."""
        return self.head_dim

    @property
    def stacks(self) -> tuple[str, ...]:
        """The name of the stack that each layer is in."""
        own = self.num_hidden_layers - self.num_kv_shared_layers
        return tuple(SHORT[kind] + (SHARING if layer >= own else "") for layer, kind in enumerate(self.kinds))

    @property
    def no_shadow(self) -> str:
        """Why PEFT's SHADOW makes no small network of it."""
        return "whose layers have embeddings of their own, which PEFT's small network loses"

    @property
    def embedding_scale(self) -> float:
        """The factor of the embeddings of tokens where they are looked up."""
        return float(self.hidden_size**0.5)

    @property
    def logits_form(self) -> LogitsForm:
        """The form of a language model's logits, from the products of its head."""
        return LogitsForm(cap=self.final_logit_softcapping)

    def heads_of(self, kind: str) -> tuple[int, int]:
        """Heads of keys and values of a kind of layer, and features of each."""
        if kind == SLIDING:
            return self.num_key_value_heads, self.head_dim
        own = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return self.num_key_value_heads if own is None else own, self.global_head_dim

    @classmethod
    def from_hf(cls, hf: Any) -> Gemma4Config:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.

        Example:
            >>> Gemma4Config.from_hf({"model_type": "gemma4_text", "global_head_dim": 64}).global_head_dim
            64
        """
        full = complete(hf, cls.stems)
        if full.get("enable_moe_block"):
            raise ValueError("enable_moe_block=True (layers with experts) is not supported.")
        if full.get("use_bidirectional_attention") == "all":
            raise ValueError("use_bidirectional_attention='all' (attention in both directions) is not supported.")
        fields = without(present(full, field_names(cls)), ["ropes", "global_head_dim"])
        ropes = ropes_by_kind(full["rope_parameters"], set(full["layer_types"]))
        fields |= {"layer_types": tuple(full["layer_types"]), "ropes": tuple(ropes.items())}
        fields |= _of_full_layers(full)
        return cls(**{**fields, **read_common(cls, full)})

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture."""
        hf = entries(self, "ropes") | write_common(self)
        hf["layer_types"] = list(self.kinds)
        hf["rope_parameters"] = ropes_to_hf(dict(self.ropes), nested=True)
        return hf


def _of_full_layers(full: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of full layers, which transformers keeps by number of layer."""
    layers = {int(number): dict(values) for number, values in (full.get("per_layer_config") or {}).items()}
    wanted = {number for number, kind in enumerate(full["layer_types"]) if kind == FULL}
    values = layers.get(min(wanted), {}) if wanted else {}
    known = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    unlike = [one for one in layers.values() if one != values]
    if wanted != layers.keys() or unlike or not values.keys() <= known.keys():
        raise ValueError(
            f"per_layer_config={layers} is not supported, only head_dim and num_key_value_heads, alike in full layers."
        )
    return {known[name]: value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Gemma4MultimodalConfig(Gemma4Config):
    """Architecture of the text part of a multimodal Gemma 4, whose modules have names of their own.

    A checkpoint that is written of it is that of a text model.

    Example:
        >>> Gemma4MultimodalConfig.from_hf({"model_type": "gemma4", "text_config": {"hidden_size": 64}}).hidden_size
        64
    """

    stems = MappingProxyType({MULTIMODAL: "Gemma4"})
    tasks = MappingProxyType({CAUSAL_LM: "ForConditionalGeneration"})

    model_type: str = MULTIMODAL

    @classmethod
    def from_hf(cls, hf: Any) -> Gemma4MultimodalConfig:
        """Read a Hugging Face config; arguments and errors are those of `Gemma4Config.from_hf`."""
        text = Gemma4Config.from_hf(text_part(hf, MULTIMODAL, TEXT))
        return as_class(text, cls, model_type=MULTIMODAL, task_type=CAUSAL_LM)

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json of a text model."""
        return as_class(self, Gemma4Config, model_type=TEXT).to_hf()
