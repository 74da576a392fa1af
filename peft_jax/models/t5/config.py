"""The configuration of the T5 family, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import without
from peft_jax.models.config import SEQ_2_SEQ_LM, ModelConfig
from peft_jax.models.hf_config import as_dict, complete
from peft_jax.models.modules.base_dropout import DropoutRates

WITHOUT_LIMIT = 1 << 30  # relative positions go on


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """Architecture of an encoder-decoder of the T5 family: T5, T5 v1.1, FLAN-T5 and mT5.

    Fields that config.json calls d_model, d_kv, d_ff, num_layers and num_heads have the names of the other models here.

    Attributes:
        num_hidden_layers: Blocks of the encoder.
        num_decoder_layers: Blocks of the decoder; None means as many.
        feed_forward_proj: An activation (``"relu"``: T5), or a gated one (``"gated-gelu"``: v1.1, FLAN, mT5).
        dropout_rate: The probability with which all that T5 drops in training is dropped.
        initializer_factor: Multiplies the deviations of random parameters.
        tie_word_embeddings: Whether the output head is the embedding ``shared``.
        scale_decoder_outputs: Whether the head's inputs are multiplied by ``hidden_size**-0.5``; None means as
            tie_word_embeddings for T5, and no for mT5.
        share_embeddings: Whether encoder and decoder look up in ``shared``; otherwise each in its ``embed_tokens``.
        decoder_start_token_id: What the decoder's inputs begin with; several are those of the rows of a batch, which
            ``generate`` takes and training does not, as in transformers.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> T5Config(hidden_size=16, num_hidden_layers=2, feed_forward_proj="gated-gelu").activation
        'gelu_new'
    """

    stems = MappingProxyType({"t5": "T5", "mt5": "MT5"})
    tasks = MappingProxyType({SEQ_2_SEQ_LM: "ForConditionalGeneration"})
    spelled = MappingProxyType(
        {
            "hidden_size": "d_model",
            "head_dim": "d_kv",
            "intermediate_size": "d_ff",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
        }
    )
    fixed = MappingProxyType({"is_encoder_decoder": True, "is_decoder": False})

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_decoder_layers: int | None = None
    num_attention_heads: int = 8
    max_position_embeddings: int = WITHOUT_LIMIT
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    share_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | tuple[int, ...] | None = 0
    model_type: str = "t5"
    task_type: str = SEQ_2_SEQ_LM

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj={self.feed_forward_proj!r} is not supported. "
                f"Write one of {', '.join(ACTIVATIONS)}, or 'gated-' and one of them."
            )
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_hidden_layers)
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings and self.model_type == "t5")
        if self.scale_decoder_outputs and self.model_type != "t5":
            raise ValueError("scale_decoder_outputs=True is for T5; mT5 has no scale. Leave it out.")
        if self.tie_word_embeddings and not self.share_embeddings:
            raise ValueError("share_embeddings=False leaves the head no table. Write tie_word_embeddings=False too.")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets={buckets} has to be at least 4, and relative_attention_max_distance="
                f"{distance} above half of it."
            )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network multiplies the activation by a second projection."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Name of the activation; a gated gelu is the tanh approximation, as in transformers."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.is_gated and name == "gelu" else name

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        rate = self.dropout_rate
        return DropoutRates(rate, rate, rate, rate, inner=rate, final=rate)

    @property
    def kv_heads(self) -> int:
        """Heads of the keys."""
        return self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Their width."""
        return self.head_dim

    @property
    def depths(self) -> dict[str, int]:
        """The number of blocks of each stack."""
        return {"encoder": self.num_hidden_layers, "decoder": self.num_decoder_layers or self.num_hidden_layers}

    @classmethod
    def from_hf(cls, hf: Any) -> T5Config:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.

        Example:
            >>> T5Config.from_hf({"model_type": "t5", "tie_word_embeddings": False}).scale_decoder_outputs
            False
        """
        full = complete(hf, cls.stems)
        start = full.get("decoder_start_token_id")
        config = dataclasses.replace(
            super().from_hf(hf),
            # transformers 5 ties always, and unties if the checkpoint has a head of its own, as we do on loading one.
            tie_word_embeddings=as_dict(hf).get("tie_word_embeddings") is not False,
            scale_decoder_outputs=full.get("scale_decoder_outputs", False),
            decoder_start_token_id=tuple(start) if isinstance(start, list) else start,
        )
        told = (full.get("dense_act_fn"), full.get("is_gated_act"))
        if told != (config.activation, config.is_gated):
            raise ValueError(
                f"The config has dense_act_fn={told[0]!r} and is_gated_act={told[1]!r}, which are not those of "
                f"feed_forward_proj={config.feed_forward_proj!r}. Set feed_forward_proj alone."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture.

        Example:
            >>> config = T5Config(num_hidden_layers=2, tie_word_embeddings=False)
            >>> T5Config.from_hf(config.to_hf()) == config
            True
        """
        hf = super().to_hf() | {"dense_act_fn": self.activation, "is_gated_act": self.is_gated}
        if isinstance(self.decoder_start_token_id, tuple):
            hf["decoder_start_token_id"] = list(self.decoder_start_token_id)
        # The tensors tell the first; the others are not T5's.
        absent = {"share_embeddings", "max_position_embeddings", "initializer_range", "bos_token_id"}
        absent |= set() if self.model_type == "t5" else {"scale_decoder_outputs"}
        return without({**hf, **self.fixed}, absent)
