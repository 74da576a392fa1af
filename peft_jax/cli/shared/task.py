"""The tasks of the commands, and the task that a checkpoint or an adapter is for. No other module branches on tasks.

A new task is an entry in `TASKS`: the class that reads its models, the records that it learns from, how they become
rows, and what an evaluation reports.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_jax.cli.shared.command_line import flag
from peft_jax.cli.shared.forward_pass import apply as plain_apply
from peft_jax.cli.shared.forward_pass import apply_lazily, apply_spans
from peft_jax.cli.shared.head_labels import (
    HeadLabels,
    id2label_of,
    labels_of_adapter,
    labels_of_texts,
    labels_of_words,
    problem_of_texts,
)
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.articles import article
from peft_jax.interop.describe import read_adapter_config
from peft_jax.methods.roles import Whole
from peft_jax.models.config import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    MASKED_LM,
    QUESTION_ANS,
    SEQ_2_SEQ_LM,
    SEQ_CLS,
    TOKEN_CLS,
)
from peft_jax.models.gguf_checkpoint import base_config, dequantized_note
from peft_jax.models.handles import auto
from peft_jax.models.handles.base import ModelHandle
from peft_jax.models.handles.label_losses import MULTI, REGRESSION, SINGLE
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM
from peft_jax.models.registry import read_architecture
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train import (
    Batch,
    Chat,
    Completion,
    Labelled,
    PlainText,
    Record,
    encode_answers,
    encode_texts,
    evaluate,
    make_evaluation_step,
    make_scoring_step,
    score,
)
from peft_jax.train.data.chats import ChatMasks
from peft_jax.train.data.encode import Encoded, encode
from peft_jax.train.data.long_examples import Long
from peft_jax.train.data.records import AnyRecord, Question, Tagged, named
from peft_jax.train.data.spans import encode_spans, questions
from peft_jax.train.data.tags import encode_tags
from peft_jax.train.data.template import Layout
from peft_jax.train.data.token_rows import Watch
from peft_jax.train.problems import (
    MULTI_LABEL_PROBLEM,
    REGRESSION_PROBLEM,
    Problem,
    make_guessing_step,
    score_guesses,
    span_problem,
    tag_problem,
)


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """How records become rows: what the options of the same names say, how many tasks a prompt has, and who watches.

    ``masks`` gets what was learned of chats, and ``virtual`` counts the tokens of a prompt.
    """

    cutoff_len: int
    template: Layout
    train_on_inputs: bool = False
    tasks: int = 0
    masks: ChatMasks = dataclasses.field(default_factory=ChatMasks)
    long: Long = "drop"
    stride: int | None = None
    virtual: int = 0
    watch: Watch = iter


LabelsOf = Callable[[str, Sequence[AnyRecord], str | None, str | None], HeadLabels]
ProblemOf = Callable[[Any, Sequence[AnyRecord], Encoded], Problem | None]
Evaluation = Callable[[Any, Iterable[Batch]], dict[str, float]]


def _no_problem(model: ModelHandle, records: Sequence[AnyRecord], encoded: Encoded) -> Problem | None:
    return None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, by PEFT's name.

    Attributes:
        name: That name.
        reader: What reads its models.
        kinds: The records that it learns from.
        encode: Rows from records, a tokenizer, a model and a layout.
        pipeline: The hub's name of it.
        apply: The function of model and batch that the steps compute.
        next_token: Whether prompt and answer are one text, and logits predict the label at the next position.
        has_classes: Whether it predicts classes, whose names are in a file beside an adapter.
        tells: What it predicts, in words; empty for a language model.
        labels_of: The labels that a checkpoint learns from records, where it predicts classes: of the checkpoint, the
            records, its GGUF file and the --problem-type.
        problem_of: How a model is trained and measured on records as rows, where that is not the cross entropy of
            tokens or of one class.
    """

    name: str
    reader: type[auto.AutoHandle]
    kinds: tuple[type, ...]
    encode: Callable[[Sequence[AnyRecord], Any, Any, RowOptions], Encoded]
    pipeline: str
    apply: Callable[..., Any] = plain_apply
    next_token: bool = False
    has_classes: bool = False
    tells: str = ""
    labels_of: LabelsOf | None = None
    problem_of: ProblemOf = _no_problem

    @property
    def auto_peft(self) -> str:
        """PEFT's class that reads adapters for it with their base."""
        return self.reader.__name__.replace("AutoModel", "AutoPeftModel")

    @property
    def writes(self) -> bool:
        """Whether it is a language model's."""
        return not self.tells

    def make_evaluation(self, problem: Problem | None) -> Evaluation:
        """The evaluation of a model on batches: the loss, for classes the accuracy, and the scores of a problem."""
        if problem is not None:
            guessing = make_guessing_step(self.apply, problem)
            return partial(score_guesses, guessing, problem)
        if self.has_classes:
            return partial(score, make_scoring_step(self.apply))
        step = make_evaluation_step(self.apply, next_token=self.next_token)
        return lambda model, batches: {"loss": evaluate(step, model, batches)}

    def check(self, records: Sequence[AnyRecord]) -> None:
        """Raise ValueError for records that it does not learn from."""
        for record in records:
            if not isinstance(record, self.kinds):
                raise ValueError(
                    f"{self.name} is learned from {named(*self.kinds)}, and the data has {named(type(record))}. Give "
                    "such data; what else finetune trains a model for, its --task says."
                )

    def read_for(self, model: str, adapter: Path | None, **options: Any) -> Any:
        """Read a base model for an adapter, or to run alone."""
        labels = None
        if adapter is not None and self.has_classes:
            labels = labels_of_adapter(adapter, model, self.name, options.get("gguf_file"))
        return self.read(model, labels, **options)

    def read(self, model: str, labels: HeadLabels | None = None, **options: Any) -> Any:
        """Read a base model, with the labels of its head if they are given; `fresh_modules` says what it lacks.

        What the weights of a GGUF file became is said on stderr.
        """
        if self.has_classes and labels is not None:
            options |= {"id2label": labels.id2label, "problem_type": labels.problem_type}
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of leaves that start at random
            read = self.reader.from_pretrained(model, **options)
        gguf_file = options.get("gguf_file")
        if gguf_file is not None and (note := dequantized_note(model, gguf_file, read.params)):
            print(note, file=sys.stderr)
        return read


def _refuse_stride(layout: RowOptions) -> None:
    """Raise ValueError for a --stride of rows that are no windows of a text."""
    if layout.stride is not None:
        raise ValueError(
            f"--stride is for {QUESTION_ANS} and {TOKEN_CLS}, which read a long text in windows. Leave it out."
        )


def _causal(records: Sequence[AnyRecord], tokenizer: Tokenizer, model: ModelHandle, layout: RowOptions) -> Encoded:
    _refuse_stride(layout)
    options = dict(vars(layout))
    del options["virtual"], options["stride"]
    return encode(records, tokenizer, **options)


def _answers(records: Sequence[AnyRecord], tokenizer: Tokenizer, model: Seq2SeqLM, layout: RowOptions) -> Encoded:
    _refuse_stride(layout)
    start = getattr(model.config, "decoder_start_token_id", None)  # encoder-decoders alone have the field
    if start is None:
        raise ValueError("the model's config.json has no decoder_start_token_id, which answers begin with. Name it.")
    if isinstance(start, tuple):
        raise ValueError(
            f"the model's config.json has decoder_start_token_id={list(start)}, one a row, and answers are trained "
            "with one for all. Name one."
        )
    return encode_answers(
        records,
        tokenizer,
        cutoff_len=layout.cutoff_len,
        start_token_id=start,
        template=layout.template,
        tasks=layout.tasks,
        long=layout.long,
        watch=layout.watch,
    )


def _texts(records: Sequence[AnyRecord], tokenizer: Tokenizer, model: ModelHandle, layout: RowOptions) -> Encoded:
    _refuse_stride(layout)
    if model.config.pad_token_id is None:
        raise ValueError(
            "the model's config.json has no pad_token_id, by which a classifier finds the ends of texts. Name one, "
            "such as that of the tokenizer's pad_token."
        )
    return encode_texts(
        records,
        tokenizer,
        cutoff_len=layout.cutoff_len,
        id2label=id2label_of(model),
        problem=problem_of_texts(model.config, records),
        token_types=getattr(model.config, "type_vocab_size", 0) > 1,
        tasks=layout.tasks,
        long=layout.long,
        watch=layout.watch,
    )


def _words(records: Sequence[AnyRecord], tokenizer: Tokenizer, model: ModelHandle, layout: RowOptions) -> Encoded:
    return encode_tags(
        records,
        tokenizer,
        cutoff_len=layout.cutoff_len,
        id2label=id2label_of(model),
        tasks=layout.tasks,
        long=layout.long,
        stride=layout.stride,
        watch=layout.watch,
    )


def _spans(records: Sequence[AnyRecord], tokenizer: Tokenizer, model: ModelHandle, layout: RowOptions) -> Encoded:
    if layout.tasks:
        raise ValueError("an adapter of several tasks is not for spans, whose models take no task_ids. Take another.")
    return encode_spans(
        records,
        tokenizer,
        cutoff_len=layout.cutoff_len,
        token_types=getattr(model.config, "type_vocab_size", 0) > 1 and not layout.virtual,  # as PEFT drops them
        long=layout.long,
        stride=layout.stride,
        watch=layout.watch,
    )


def _span_problem(model: ModelHandle, records: Sequence[AnyRecord], encoded: Encoded) -> Problem | None:
    return span_problem(questions(records), encoded.windows)


def _word_problem(model: ModelHandle, records: Sequence[AnyRecord], encoded: Encoded) -> Problem | None:
    return tag_problem(id2label_of(model))


def _text_problem(model: ModelHandle, records: Sequence[AnyRecord], encoded: Encoded) -> Problem | None:
    return TEXT_PROBLEMS[problem_of_texts(model.config, records)]


TEXT_PROBLEMS: Mapping[str, Problem | None] = {SINGLE: None, MULTI: MULTI_LABEL_PROBLEM, REGRESSION: REGRESSION_PROBLEM}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=CAUSAL_LM,
            reader=auto.AutoModelForCausalLM,
            kinds=(Record, Completion, Chat, PlainText),
            encode=_causal,
            pipeline="text-generation",
            apply=apply_lazily,
            next_token=True,
        ),
        Task(
            name=SEQ_2_SEQ_LM,
            reader=auto.AutoModelForSeq2SeqLM,
            kinds=(Record, Completion),
            encode=_answers,
            pipeline="text2text-generation",
        ),
        Task(
            name=SEQ_CLS,
            reader=auto.AutoModelForSequenceClassification,
            kinds=(Labelled,),
            encode=_texts,
            pipeline="text-classification",
            has_classes=True,
            tells="classes of texts",
            labels_of=labels_of_texts,
            problem_of=_text_problem,
        ),
        Task(
            name=TOKEN_CLS,
            reader=auto.AutoModelForTokenClassification,
            kinds=(Tagged,),
            encode=_words,
            pipeline="token-classification",
            has_classes=True,
            tells="classes of words",
            labels_of=labels_of_words,
            problem_of=_word_problem,
        ),
        Task(
            name=QUESTION_ANS,
            reader=auto.AutoModelForQuestionAnswering,
            kinds=(Question,),
            encode=_spans,
            pipeline="question-answering",
            apply=apply_spans,
            tells="spans of texts",
            problem_of=_span_problem,
        ),
    )
}


def task_of(model: str, said: str | None, gguf_file: str | None = None) -> Task:
    """The task that an option or an adapter says, else the one that a checkpoint's config.json names.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the commands are not for that task, or the checkpoint is not.
    """
    config = read_architecture(base_config(model, gguf_file))
    name = said or config.task_type
    if name in TASKS:
        dataclasses.replace(config, task_type=name).check()
        return TASKS[name]
    if said is None and name in (MASKED_LM, FEATURE_EXTRACTION):
        able = [task for task in TASKS if task in config.tasks]
        raise ValueError(
            f"{model} is {article(config.architecture)}, which has no head for a task. finetune gives it one with "
            f"--task {' or '.join(able)}."
        )
    raise ValueError(
        f"the commands are for {', '.join(TASKS)}, not for {name}. Train and run such a model in Python, as "
        "examples/classify_docstrings.py does, with "
        "pj.AutoModelForMaskedLM or pj.AutoModel."
    )


def task_of_adapter(model: str, adapter: Path | None, gguf_file: str | None = None) -> Task:
    """The task of an adapter, or of a base model alone; errors are those of `task_of`."""
    return task_of(model, None if adapter is None else read_adapter_config(adapter).get("task_type"), gguf_file)


def check_options(task: Task, given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option, by its name, that is for other tasks."""
    for name in ("packing", "train_on_inputs"):
        if given.get(name) and not task.next_token:
            raise ValueError(f"{flag(name)} is for {CAUSAL_LM}, whose prompt and answer are one text. Leave it out.")
    if given["problem_type"] is not None and task.name != SEQ_CLS:
        raise ValueError(f"--problem-type is for {SEQ_CLS}, and the task is {task.name}. Leave it out.")
    if given["label_names"] is not None and not task.has_classes:
        raise ValueError(f"--label-names is for classes, and {task.name} has none. Leave it out.")
    if given["streaming"] and not task.writes:
        raise ValueError(f"--streaming reads no labels of all records, which {task.name} begins with. Leave it out.")


def fresh_modules(model: ModelHandle) -> list[str]:
    """The modules that a checkpoint lacks and no adapter on it holds, which are random and would not be saved."""
    held = {path for path, leaf in adapted_leaves(model.params) if isinstance(leaf.tag.role, Whole)}
    return list(dict.fromkeys(path.rpartition(".")[0] for path in model.source.fresh if path not in held))


def refuse_random(model: ModelHandle) -> None:
    """Raise ValueError for a model that has random weights."""
    if modules := fresh_modules(model):
        raise ValueError(
            f"{model.name_or_path} has no {' and no '.join(modules)}, and no adapter has them, so what came out would "
            "be random. Give a base that has them, or an adapter with modules_to_save that was trained with them."
        )
