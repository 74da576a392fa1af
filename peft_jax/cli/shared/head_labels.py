"""The names and the kind of a head's labels: from a checkpoint, from data, or from the file beside an adapter."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_jax.interop.checkpoint import read_config
from peft_jax.interop.describe import read_adapter
from peft_jax.models.config import SEQ_CLS, TOKEN_CLS, ModelConfig
from peft_jax.models.gguf_checkpoint import base_config
from peft_jax.models.handles.base import ModelHandle
from peft_jax.models.handles.label_losses import PROBLEMS, REGRESSION, SINGLE
from peft_jax.models.hf_config import label_fields, numbered_labels
from peft_jax.models.registry import family_of, read_architecture
from peft_jax.train.data.classes import labelled
from peft_jax.train.data.label_kinds import names_of, problem_of
from peft_jax.train.data.records import AnyRecord, Labelled
from peft_jax.train.data.tags import tag_names

LABELS_FILE = "labels.json"  # beside an adapter: the names of its classes, as config.json has them


@dataclasses.dataclass(frozen=True)
class HeadLabels:
    """The labels of a head.

    Attributes:
        id2label: The names of its outputs by number; None for those of the checkpoint.
        problem_type: Their kind, as transformers names it; None where one class of a text is meant, or the
            checkpoint says it.
        is_held: Whether a checkpoint's head has them, and no others.
    """

    id2label: Mapping[int, str] | None = None
    problem_type: str | None = None
    is_held: bool = False


def labels_of_texts(
    model: str, records: Sequence[AnyRecord], gguf_file: str | None = None, said: str | None = None
) -> HeadLabels:
    """The labels that texts are learned with: those of a checkpoint that is a classifier, else those of the records.

    Args:
        model: The checkpoint.
        records: The records.
        gguf_file: The GGUF file that it is read from.
        said: The kind of labels that an option names.

    Raises:
        ValueError: If the option contradicts the checkpoint, or records have no such labels.
    """
    hf = base_config(model, gguf_file)
    config = read_architecture(hf)
    if config.task_type != SEQ_CLS:
        found = labelled(records)
        problem = said or problem_of(found)
        return HeadLabels(names_of(found, problem), None if problem == SINGLE else problem)
    own = _said_by(config)
    if said is not None and own not in (None, said):
        raise ValueError(f"--problem-type {said}, but {model} is for {own}. Drop --problem-type.")
    problem = own or said or problem_of(labelled(records))
    names = hf.get("id2label") or numbered_labels(config.num_labels)
    kind = None if problem == SINGLE else problem
    return HeadLabels({int(number): name for number, name in names.items()}, kind, is_held=True)


def labels_of_words(
    model: str, records: Sequence[AnyRecord], gguf_file: str | None = None, said: str | None = None
) -> HeadLabels:
    """The classes of words: those of a checkpoint that is a classifier of tokens, else those of the records.

    The arguments and errors are those of `labels_of_texts`; no kind of labels may be said.
    """
    hf = base_config(model, gguf_file)
    config = read_architecture(hf)
    if config.task_type != TOKEN_CLS:
        return HeadLabels(tag_names(records))
    names = hf.get("id2label") or numbered_labels(config.num_labels)
    return HeadLabels({int(number): name for number, name in names.items()}, is_held=True)


def with_names(found: HeadLabels, names: Sequence[str]) -> HeadLabels:
    """Labels with names for classes that have numbers alone.

    Args:
        found: The labels of a checkpoint or of data.
        names: The names, by number.

    Raises:
        ValueError: If the classes have names, what is predicted is no class, there are too few names or more than a
            checkpoint's head has classes, or one comes twice.

    Example:
        >>> with_names(HeadLabels(numbered_labels(2)), ["O", "B-PER"]).id2label
        {0: 'O', 1: 'B-PER'}
    """
    if found.problem_type == REGRESSION:
        raise ValueError("--label-names is for classes, and numbers are predicted here. Leave it out.")
    known = found.id2label or {}
    if dict(known) != numbered_labels(len(known)):
        raise ValueError(
            f"--label-names names classes that have numbers, and these are {', '.join(known.values())}. Leave it out."
        )
    if len(names) < len(known):
        raise ValueError(f"--label-names has {len(names)} names, and there are {len(known)} classes. Name each.")
    if len(names) > len(known) and found.is_held:
        raise ValueError(
            f"--label-names has {len(names)} names, and the checkpoint's head has {len(known)} classes. Name these."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--label-names has {twice[0]} twice. Name each class once.")
    return dataclasses.replace(found, id2label=dict(enumerate(names)))


def named_by_data(found: HeadLabels, names: Sequence[str]) -> HeadLabels:
    """As `with_names`, with names that a data file has for its classes; labels that they do not fit stay.

    `peft_jax.cli.shared.class_numbers.by_names_of` has a note of that.

    Raises:
        ValueError: If a name comes twice.

    Example:
        >>> named_by_data(HeadLabels(numbered_labels(2)), ["O", "B-PER", "I-PER"]).id2label
        {0: 'O', 1: 'B-PER', 2: 'I-PER'}
        >>> named_by_data(HeadLabels({0: "no", 1: "yes"}), ["O", "B-PER"]).id2label
        {0: 'no', 1: 'yes'}
    """
    known = found.id2label or {}
    is_named = dict(known) != numbered_labels(len(known))
    is_other = len(names) < len(known) or found.is_held and len(names) > len(known)
    if is_named or is_other or found.problem_type == REGRESSION:
        return found
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"the data names two classes {twice[0]}. Name each class once, or give --label-names.")
    return with_names(found, names)


def problem_of_texts(config: ModelConfig, records: Sequence[AnyRecord]) -> str:
    """The kind of labels of a classifier of texts: as its config says, else as those of the records."""
    return _said_by(config) or problem_of([record for record in records if isinstance(record, Labelled)])


def _said_by(config: ModelConfig) -> str | None:
    """The kind of labels that a config says, as transformers reads it; None if it leaves that to the labels."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else None)


def id2label_of(model: ModelHandle) -> dict[int, str]:
    """The names of a classifier's classes."""
    return dict(model.source.id2label) or numbered_labels(model.config.num_labels)


def write_labels(model: ModelHandle, file: Path) -> None:
    """Write the names of a classifier's classes, as config.json has them, and their kind where it says one."""
    fields = label_fields(id2label_of(model))
    if model.config.problem_type is not None:
        fields["problem_type"] = model.config.problem_type
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def labels_of_adapter(adapter: Path, model: str, task: str, gguf_file: str | None = None) -> HeadLabels:
    """The labels in the file beside an adapter; else numbers for the rows of its head.

    Args:
        adapter: The adapter's folder.
        model: The checkpoint.
        task: The adapter's task.
        gguf_file: The GGUF file that the checkpoint is read from.

    Raises:
        ValueError: If a file is damaged.
    """
    if (adapter / LABELS_FILE).is_file():
        return _read_labels(adapter)
    config = dataclasses.replace(read_architecture(base_config(model, gguf_file)), task_type=task)
    key_end = f"{family_of(config).class_layer(config)}.weight"
    for key, tensor in (read_adapter(adapter).tensors or {}).items():
        if key.endswith(key_end) and tensor.shape[0] != config.num_labels:
            return HeadLabels(numbered_labels(tensor.shape[0]))
    return HeadLabels()


def _read_labels(adapter: Path) -> HeadLabels:
    fields = read_config(adapter, LABELS_FILE)
    found, problem = fields.get("id2label"), fields.get("problem_type")
    if not isinstance(found, dict) or not all(number.isdigit() for number in found):
        raise ValueError(f"{adapter / LABELS_FILE} has no id2label of numbers to names. Copy the adapter again.")
    if problem not in (None, *PROBLEMS):
        raise ValueError(
            f"{adapter / LABELS_FILE} has the problem_type {problem!r}, which is none of {', '.join(PROBLEMS)}. Copy "
            "the adapter again."
        )
    return HeadLabels({int(number): str(name) for number, name in found.items()}, problem)
