"""Base class of the configurations of all architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from peft_jax.core.articles import article
from peft_jax.models.hf_config import check_fixed, check_model_type, complete, label_fields, numbered_labels
from peft_jax.models.modules.base_dropout import NO_DROPOUT, DropoutRates
from peft_jax.models.modules.logits_form import PLAIN, LogitsForm
from peft_jax.models.modules.router_load import Routing

CAUSAL_LM, SEQ_2_SEQ_LM, MASKED_LM = "CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM"
SEQ_CLS, TOKEN_CLS, QUESTION_ANS = "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"
FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # kinds of layers
LINEAR = "linear_attention"  # the kind that keeps a memory of fixed size in place of keys and values

# How the names of transformers' classes end, and PEFT's name for what they do (MASKED_LM is ours: PEFT has none).
SUFFIXES = {
    "ForCausalLM": CAUSAL_LM,
    "LMHeadModel": CAUSAL_LM,
    "ForConditionalGeneration": SEQ_2_SEQ_LM,
    "ForMaskedLM": MASKED_LM,
    "ForSequenceClassification": SEQ_CLS,
    "ForTokenClassification": TOKEN_CLS,
    "ForQuestionAnswering": QUESTION_ANS,
    "Model": FEATURE_EXTRACTION,
}
LABELS = 2  # transformers' default
HEAD_RATE = 0.1  # at which transformers' classifiers of tokens drop if their config does not say
# Fields that are no entries of a config.json: `write_common` writes the first three in another form, if at all.
NO_ENTRIES = ("task_type", "num_labels", "problem_type", "trains_padding")


C = TypeVar("C", bound="ModelConfig")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model and what it does; the fields have transformers' common names for them.

    A subclass adds the fields of its architecture, and names its classes in transformers by two tables. Hashable,
    hence usable as a static argument of `jax.jit`.

    Attributes:
        eos_token_id: One id, several ids, or None.
        task_type: What the model does, one of the keys of ``tasks``: which head it has.
        num_labels: Outputs of a classification head.
        problem_type: Loss of a sequence classifier: "regression", "single_label_classification" or
            "multi_label_classification"; None decides by the labels.
        model_type: transformers' name of the architecture, one of the keys of ``stems``.
        trains_padding: Whether lookups of ``pad_token_id`` train its row of the embedding. By default they do not
            where PyTorch's embedding has a ``padding_idx``. It stands in no config.json.
    """

    stems: ClassVar[Mapping[str, str]]  # how the names of transformers' classes begin, by model type
    tasks: ClassVar[Mapping[str, str]]  # and how they end, by task; the first is meant where a config names none
    has_padding_row: ClassVar[bool] = False  # whether transformers gives the embedding a padding_idx
    spelled: ClassVar[Mapping[str, str]] = MappingProxyType({})  # our fields that have another name in config.json
    fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # its fields of which one value alone is supported

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    model_type: str
    task_type: str
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_labels: int = LABELS
    problem_type: str | None = None
    trains_padding: bool = False

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a Hugging Face config.

        Args:
            hf: The dict of a config.json (of any transformers version) or a transformers config object.

        Raises:
            ValueError: The config asks for something that would change the numbers and is not supported here.
        """
        full = complete(hf, cls.stems)
        check_fixed(full, cls.fixed)
        names = {field.name: cls.spelled.get(field.name, field.name) for field in dataclasses.fields(cls)}
        values = {ours: full[theirs] for ours, theirs in names.items() if theirs in full}
        return cls(**{**values, **read_common(cls, full)})

    def to_hf(self) -> dict[str, Any]:
        """Make the dict of a config.json that transformers (5 or newer) reads as this architecture."""
        return entries(self) | write_common(self)

    @property
    def untrained_row(self) -> int | None:
        """The row of the embedding that lookups do not train: that of padding, if it is none that is trained."""
        if not self.has_padding_row or self.trains_padding or self.pad_token_id is None:
            return None
        is_from_end = self.pad_token_id < 0  # as PyTorch counts a negative one
        return self.pad_token_id + self.vocab_size * is_from_end

    @property
    def architecture(self) -> str:
        """Name of the class in transformers."""
        return self.stems[self.model_type] + self.tasks[self.task_type]

    @property
    def room(self) -> int:
        """How many tokens a text may have."""
        return self.max_position_embeddings

    @property
    def own_backbone(self) -> str | None:
        """The module that holds all but the head, where transformers has another for the task than the family's."""
        return None

    @property
    def renewed_at(self) -> int | None:
        """How many positions a cache has when generation computes it again, as positions turn otherwise from there on.

        None for the models, which are nearly all, of which a cache stays as it is.
        """
        return None

    @property
    def position_rows(self) -> int | None:
        """Rows of the table of positions; None for a model that computes them."""
        return None

    @property
    def type_rows(self) -> int | None:
        """Rows of the table that ``token_type_ids`` are looked up in; None for a model without one."""
        return None

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_size(self) -> int:
        """Features of the embedding of a token, and of what the head takes."""
        return self.hidden_size

    @property
    def embedding_scale(self) -> float:
        """The factor of the embeddings of tokens where they are looked up."""
        return 1.0

    @property
    def logits_form(self) -> LogitsForm:
        """The form of a language model's logits, from the products of its head."""
        return PLAIN

    @property
    def routing(self) -> Routing | None:
        """The facts on which the loss of routers depends; None for a model without such a loss."""
        return None

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training, as transformers' does with such a config."""
        return NO_DROPOUT

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, which says what it sees (`peft_jax.models.modules.layer_views`)."""
        types: tuple[str, ...] | None = getattr(self, "layer_types", None)
        return (FULL,) * self.num_hidden_layers if types is None else types

    @property
    def stacks(self) -> tuple[str, ...]:
        """The name of the stack that each layer is in, for layers of several shapes; empty if all are of one."""
        return ()

    @property
    def no_prefix(self) -> str:
        """Why a prefix cannot stand before the keys and values of all layers; empty where it can."""
        return "whose layers have keys of several shapes" if self.stacks else ""

    @property
    def no_shadow(self) -> str:
        """Why PEFT's SHADOW makes no small network of it; empty where it does."""
        return "" if self.own_backbone is None else "whose text model is inside of another one"

    def with_layers(self, order: Sequence[int]) -> Self:
        """The architecture whose layers, and their kinds, are those of ``order``."""
        changes: dict[str, Any] = {"num_hidden_layers": len(order)}
        types: tuple[str, ...] | None = getattr(self, "layer_types", None)
        if types is not None:
            changes["layer_types"] = tuple(types[layer] for layer in order)
        return dataclasses.replace(self, **changes)

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        check_model_type(self.model_type, self.stems)
        if self.task_type not in self.tasks:
            raise ValueError(
                f"{article(self.model_type, first=True)} model for {self.task_type} is not supported. "
                f"Supported: {', '.join(self.tasks)}."
            )


def check_kinds(config: ModelConfig, kinds: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless layer_types names one of the known kinds for each layer."""
    if len(kinds) != config.num_hidden_layers or not set(kinds) <= set(known):
        raise ValueError(
            f"layer_types must name {' or '.join(map(repr, known))} for each of {config.num_hidden_layers} layers, "
            f"got {tuple(kinds)}."
        )


def as_class(config: ModelConfig, cls: type[C], **changes: Any) -> C:
    """The fields of a config as one of another class, which has the same ones, with some changed.

    Example:
        >>> from peft_jax.models.gemma.config import GemmaConfig, Gemma3Config
        >>> as_class(Gemma3Config(hidden_size=64), GemmaConfig, model_type="gemma3_text").hidden_size
        64
    """
    return cls(**{**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **changes})


def task_of(hf: Mapping[str, Any], tasks: Mapping[str, str]) -> str:
    """The task of a checkpoint: of the first of its ``architectures``, or the first of ``tasks`` where that has none.

    Example:
        >>> task_of({"architectures": ["BertForTokenClassification"]}, {})
        'TOKEN_CLS'
    """
    (name, *_) = hf.get("architectures") or [""]
    said = next((task for suffix, task in SUFFIXES.items() if name.endswith(suffix)), None)
    return said if said is not None and (said in tasks or not tasks) else next(iter(tasks))


def read_common(cls: type[ModelConfig], full: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that are not spelled alike in Hugging Face's configs, from all fields of one."""
    eos = full.get("eos_token_id")
    return {
        "model_type": full["model_type"],
        "task_type": task_of(full, cls.tasks),
        "num_labels": len(full["id2label"]) if full.get("id2label") else LABELS,
        "problem_type": full.get("problem_type"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
    }


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_common`, as entries of a config.json."""
    eos = config.eos_token_id
    hf: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [config.architecture],
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
    }
    if config.num_labels != LABELS:
        hf |= label_fields(numbered_labels(config.num_labels))
    if config.problem_type is not None:
        hf["problem_type"] = config.problem_type
    return hf


def entries(config: ModelConfig, *left_out: str) -> dict[str, Any]:
    """The fields of a config under their names in a config.json, without those that it has in another form.

    Args:
        config: The config.
        left_out: More fields to leave out.
    """
    unset = [field.name for field in dataclasses.fields(config) if is_unset(config, field)]
    names = [field.name for field in dataclasses.fields(config) if field.name not in (*NO_ENTRIES, *left_out, *unset)]
    return {config.spelled.get(name, name): getattr(config, name) for name in names}


def rarely_set(default: Any) -> Any:
    """A field of a config that is an entry of a config.json only where it is not its default."""
    return dataclasses.field(default=default, metadata={"rarely_set": True})


def is_unset(config: ModelConfig, field: dataclasses.Field[Any]) -> bool:
    """Whether a field is one of `rarely_set` and has its default."""
    return bool(field.metadata.get("rarely_set")) and getattr(config, field.name) == field.default


def head_rate(config: ModelConfig, classifier_dropout: float | None, hidden_dropout: float | None = None) -> float:
    """The probability with which transformers' classifiers of tokens drop inputs of their head; 0 for other tasks.

    Args:
        config: The architecture.
        classifier_dropout: The config's field of that name.
        hidden_dropout: That of this name, which counts where the other is None.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> head_rate(LlamaConfig(task_type="TOKEN_CLS"), None), head_rate(LlamaConfig(), None)
        (0.1, 0.0)
    """
    if config.task_type != TOKEN_CLS:
        return 0.0
    said = [rate for rate in (classifier_dropout, hidden_dropout) if rate is not None]
    return said[0] if said else HEAD_RATE


def check_expressible(config: ModelConfig, hf: Mapping[str, Any], fields: str) -> None:
    """Raise ValueError if a config.json is not read as the config that it was written of.

    Args:
        config: The config.
        hf: The entries of the config.json.
        fields: The fields that a model type is to be chosen by, in words.
    """
    if type(config).from_hf(hf) != dataclasses.replace(config, trains_padding=False):
        raise ValueError(
            f"transformers' {config.architecture} cannot express this configuration: {config}. "
            f"Choose the model_type whose {fields} these are."
        )
