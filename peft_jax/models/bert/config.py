"""The configurations of BERT and RoBERTa, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import (
    FEATURE_EXTRACTION,
    MASKED_LM,
    QUESTION_ANS,
    SEQ_CLS,
    TOKEN_CLS,
    ModelConfig,
)
from peft_jax.models.modules.base_dropout import DropoutRates

TASKS = MappingProxyType(
    {
        MASKED_LM: "ForMaskedLM",
        SEQ_CLS: "ForSequenceClassification",
        TOKEN_CLS: "ForTokenClassification",
        QUESTION_ANS: "ForQuestionAnswering",
        FEATURE_EXTRACTION: "Model",
    }
)


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Architecture of a BERT; the fields are those of `transformers.BertConfig`.

    Attributes:
        type_vocab_size: Number of token types.
        hidden_dropout_prob: The probability with which embeddings and outputs of layers are dropped in training.
        attention_probs_dropout_prob: The same of weights of the attention.
        classifier_dropout: The same of inputs of a classifier's head; None means hidden_dropout_prob.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> BertConfig.from_hf({"model_type": "bert", "hidden_size": 24}).type_vocab_size
        2
    """

    has_padding_row = True
    stems = MappingProxyType({"bert": "Bert"})
    tasks = TASKS
    fixed = MappingProxyType({"is_decoder": False, "add_cross_attention": False})

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    model_type: str = "bert"
    task_type: str = MASKED_LM
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        check_activation("hidden_act", self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}, "
                "which it must be."
            )

    @property
    def position_rows(self) -> int | None:
        """Rows of the table of positions."""
        return self.max_position_embeddings

    @property
    def type_rows(self) -> int | None:
        """Rows of the table of token types."""
        return self.type_vocab_size

    @property
    def untrained_position(self) -> int | None:
        """The row of the positions' table that lookups do not train; None."""
        return None

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out, head = self.hidden_dropout_prob, self.classifier_dropout
        classifier = out if head is None else head
        drops_head = self.task_type in (SEQ_CLS, TOKEN_CLS)
        return DropoutRates(out, self.attention_probs_dropout_prob, out, out, head=classifier if drops_head else 0.0)

    @property
    def heads_first(self) -> bool:
        """Whether PyTorch declares a head before the rest of the model."""
        return self.model_type == "xlm-roberta"

    @property
    def has_pooler(self) -> bool:
        """Whether the first token's output goes through a pooler."""
        return self.task_type in (SEQ_CLS, FEATURE_EXTRACTION)


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Architecture of a RoBERTa or XLM-RoBERTa; the fields are those of `transformers.RobertaConfig`.

    Positions are counted from ``pad_token_id + 1``, over the tokens that are not padding.

    Example:
        >>> RobertaConfig.from_hf({"model_type": "roberta"}).pad_token_id
        1
    """

    stems = MappingProxyType({"roberta": "Roberta", "xlm-roberta": "XLMRoberta"})

    vocab_size: int = 50265
    model_type: str = "roberta"
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None:
            raise ValueError("pad_token_id=None is not supported: this model counts positions from it. Write its id.")

    @property
    def untrained_position(self) -> int | None:
        """The position of padding, which has the number of its id."""
        return None if self.trains_padding else self.pad_token_id

    @property
    def room(self) -> int:
        """How many tokens a text may have, the first of which stands after the position of padding."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1

    @property
    def has_pooler(self) -> bool:
        """Whether the first token's output goes through a pooler; the classifier has layers of its own instead."""
        return self.task_type == FEATURE_EXTRACTION
