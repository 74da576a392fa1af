"""The configuration of GPT-2, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    QUESTION_ANS,
    SEQ_CLS,
    TOKEN_CLS,
    ModelConfig,
    head_rate,
    rarely_set,
)
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Architecture of a GPT-2, with the common names of `transformers.GPT2Config`'s fields.

    Attributes:
        n_inner: Width of the feed-forward network; None means 4 * hidden_size.
        scale_attn_weights: Whether scores are divided by the root of the head's width.
        scale_attn_by_inverse_layer_idx: Whether they are divided by the number of the layer, counted from 1, too.
        reorder_and_upcast_attn: Kept for saving: with "sdpa" attention it changes nothing.
        resid_pdrop: The probability with which outputs of layers are dropped in training.
        embd_pdrop: The same of embeddings.
        attn_pdrop: The same of weights of the attention.
        classifier_dropout: The same of inputs of a token classifier's head; None means transformers' 0.1.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> GPT2Config.from_hf({"model_type": "gpt2", "n_embd": 64, "n_head": 4}).hidden_size
        64
    """

    stems = MappingProxyType({"gpt2": "GPT2"})
    tasks = MappingProxyType(
        {
            CAUSAL_LM: "LMHeadModel",
            SEQ_CLS: "ForSequenceClassification",
            TOKEN_CLS: "ForTokenClassification",
            QUESTION_ANS: "ForQuestionAnswering",
            FEATURE_EXTRACTION: "Model",
        }
    )
    spelled = MappingProxyType(
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
    )
    fixed = MappingProxyType({"add_cross_attention": False})

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    model_type: str = "gpt2"
    task_type: str = CAUSAL_LM
    tie_word_embeddings: bool = True
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    classifier_dropout: float | None = rarely_set(None)

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        check_activation("activation_function", self.activation_function)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"n_embd={self.hidden_size} is not a multiple of n_head={self.num_attention_heads}, which it must be."
            )

    @property
    def position_rows(self) -> int | None:
        """Rows of the table of positions."""
        return self.max_position_embeddings

    @property
    def type_rows(self) -> int | None:
        """Rows of the table of tokens, of which ``token_type_ids`` are too."""
        return self.vocab_size

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.resid_pdrop
        return DropoutRates(self.embd_pdrop, self.attn_pdrop, out, out, head=head_rate(self, self.classifier_dropout))
