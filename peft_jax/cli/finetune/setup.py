"""The base model, the data and the fingerprint of a run, made from the options of `peft-jax finetune`."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.adapters.from_data import starts_from_data
from peft_jax.cli.command_options import Preview
from peft_jax.cli.finetune.adapter_config import is_json
from peft_jax.cli.finetune.initialize import START
from peft_jax.cli.finetune.options import (
    DataOptions,
    Finetune,
    ModelOptions,
    flag,
    settings,
)
from peft_jax.cli.shared.class_numbers import by_names_of
from peft_jax.cli.shared.data_sources import Loaded, sources_of
from peft_jax.cli.shared.head_labels import LABELS_FILE, HeadLabels, id2label_of, named_by_data, with_names
from peft_jax.cli.shared.row_layout import row_options, said_of_chats, said_of_length
from peft_jax.cli.shared.task import RowOptions, Task
from peft_jax.cli.shared.training_layout import (
    ANSWERS,
    CHATS,
    EVERYTHING,
    TEXTS,
    NamedLayout,
    TrainingLayout,
    choose_layout,
    template_digest,
)
from peft_jax.core.selecting import picked
from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.methods.base import Method, PeftConfig
from peft_jax.models.gguf_checkpoint import base_files
from peft_jax.models.handles.base import ModelHandle
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train import Packed, Padded
from peft_jax.train.data.batches import Data, Mixture
from peft_jax.train.data.chats import LAST, MARKS, ChatMasks
from peft_jax.train.data.encode import Encoded, Example
from peft_jax.train.data.records import AnyRecord, Chat, Record
from peft_jax.train.data.template import Layout
from peft_jax.train.problems import Problem


@dataclasses.dataclass(frozen=True)
class Examples:
    """The data of a run.

    Attributes:
        training: Rows to train on.
        validation: Rows kept apart, or None.
        said: The report on it that is printed.
        digest: Hash of all tokens and labels.
        layout: How the data were laid out.
        ends: The special tokens that end learned turns of chats.
        problem: How the model is trained and measured on them, where the task has several ways.
        sample: The first rows, where the others are read when they are needed.
    """

    training: Data
    validation: Data | None
    said: str
    digest: str
    layout: TrainingLayout
    ends: frozenset[int] = frozenset()
    problem: Problem | None = None
    sample: Data | None = None

    @property
    def parts(self) -> list[Data]:
        """The training rows, or the first of them, and the validation rows if there are any."""
        training = self.training if self.sample is None else self.sample
        return [training] if self.validation is None else [training, self.validation]


def training_rows(options: DataOptions, base: ModelHandle, layout: Layout, config: PeftConfig) -> RowOptions:
    """How records become rows to train an adapter of a config on, which may have several tasks and virtual tokens."""
    slots, tasks = getattr(config, "slots", 0), getattr(config, "tasks", 0)
    more = {"train_on_inputs": options.train_on_inputs, "virtual": slots, "tasks": tasks}
    return row_options(options, base.config, layout, **more)


def make_data(
    task: Task,
    loaded: Loaded,
    tokenizer: Tokenizer,
    base: ModelHandle,
    options: DataOptions,
    seed: int,
    config: PeftConfig,
    recorded: TrainingLayout | None = None,
) -> Examples:
    """Tokenize, split and lay out.

    Args:
        task: What is trained.
        loaded: The records.
        tokenizer: The checkpoint's tokenizer.
        base: The model.
        options: How they are laid out.
        seed: Seed of the split.
        config: The adapter's config, which may have several tasks and virtual tokens.
        recorded: How the data of the adapter were laid out that is trained on, if there is one.

    Raises:
        ValueError: If nothing fits, or nothing is left to train on.
    """
    if task.has_classes:
        loaded = by_names_of(loaded, id2label_of(base))
    used = layout_of_data(options.prompt_template, recorded, loaded.records, tokenizer, task)
    rows = training_rows(options, base, used.layout, config)
    encoded = task.encode(loaded.records, tokenizer, base, rows)
    examples, longest = encoded.examples, rows.cutoff_len
    if encoded.windows:
        training, validation = _split_records(encoded.records, options.val_size, seed)
    else:
        training, validation = _split(len(examples), options.val_size, seed)

    def lay_out(places: Sequence[int]) -> Data:
        part = picked(examples, places)
        return Packed(part, longest) if options.packing else padded(task, part, longest, base)

    if loaded.weights is None:
        data = lay_out(training)
    else:
        data = Mixture([lay_out(part) for part in _by_source(training, encoded, loaded)], loaded.weights)
    kept = f", {len(validation)} of them for validation" if validation else ""
    said = f"{len(examples)} examples{kept}. {said_of_length(encoded, rows)}"
    if task.writes:
        said += f"\n{said_of_layout(used, rows.masks)}"
    said = "\n".join([said, *loaded.notes, *said_of_chats(loaded.records, tokenizer)])
    digest = digest_of(examples)
    layout = recorded_layout(used, tokenizer, rows)
    held_out = lay_out(validation) if validation else None
    problem = task.problem_of(base, loaded.records, encoded)
    return Examples(data, held_out, said, digest, layout, frozenset(rows.masks.ends), problem)


def digest_of(examples: Sequence[Example]) -> str:
    """Hash of all tokens and labels."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes() + example.labels.tobytes())
        for name in sorted(example.more):
            digest.update(example.more[name].tobytes())
    return digest.hexdigest()


def recorded_layout(used: NamedLayout, tokenizer: Tokenizer, rows: RowOptions) -> TrainingLayout:
    """How the rows that were encoded were laid out, for the adapter's folder."""
    ends = rows.masks.ends or {tokenizer.eos_token_id} - {None}
    return TrainingLayout(
        used,
        EVERYTHING if rows.train_on_inputs else ANSWERS,
        template_digest(tokenizer) if used.is_chat else None,
        tuple(tokenizer.decode([number]) for number in sorted(ends)),
        rows.masks.rules,
        rows.masks.left_out,
    )


def layout_of_data(
    given: str | None,
    recorded: TrainingLayout | None,
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    task: Task,
) -> NamedLayout:
    """The layout of records: chats and prompts with completions have their own, and for instructions it is chosen.

    The arguments and errors are those of `choose_layout`.
    """
    if any(isinstance(record, Record) for record in records):
        return choose_layout(given, recorded, tokenizer, chats=task.next_token)
    return CHATS if any(isinstance(record, Chat) for record in records) else TEXTS


def said_of_layout(used: NamedLayout, masks: ChatMasks) -> str:
    """A line on the layout, and on how the answers of chats were found."""
    if not used.is_chat:
        return f"Layout: {used.name}."
    if masks.rules.keys() == {MARKS}:
        return "Layout: the chat template, whose generation marks say what is learned."
    if LAST not in masks.rules:
        return "Layout: the chat template. Every answer is learned."
    return (
        f"Layout: the chat template, which changes with what follows in {masks.rules[LAST]} chats.\n"
        f"{masks.left_out} answers there are not learned; the last one of each chat is."
    )


def _by_source(places: Sequence[int], encoded: Encoded, loaded: Loaded) -> list[list[int]]:
    """The places of examples, source by source.

    Raises:
        ValueError: If a source has none.
    """
    parts: list[list[int]] = [[] for _ in loaded.counts]
    for place in places:
        parts[loaded.source_of(encoded.records[place])].append(place)
    for number, part in enumerate(parts, 1):
        if not part:
            raise ValueError(
                f"of the {number}. --data no example is left to train on. Leave it out, or give more of it."
            )
    return parts


def padded(task: Task, examples: Sequence[Example], longest: int, model: ModelHandle) -> Padded:
    """Examples, one a row. Padding has the model's id, except for causal models, which go by the mask alone."""
    return Padded(examples, longest, 0 if task.next_token else model.config.pad_token_id or 0)


def split_places(examples: int, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of examples to train on, and of those for validation; both ascend.

    Raises:
        ValueError: If a part has none.
    """
    count = int(val_size) if val_size >= 1 else round(val_size * examples)
    if val_size and not 0 < count < examples:
        raise ValueError(
            f"--val-size {val_size:g} keeps {count} of {examples} examples for validation, and both parts need "
            "some. Give another size, or more data."
        )
    order = np.random.default_rng(seed).permutation(examples)
    return np.sort(order[count:]), np.sort(order[:count])


def _split(examples: int, val_size: float, seed: int) -> tuple[list[int], list[int]]:
    """As `split_places`, in lists."""
    training, validation = split_places(examples, val_size, seed)
    return training.tolist(), validation.tolist()


def _split_records(records: Sequence[int], val_size: float, seed: int) -> tuple[list[int], list[int]]:
    """As `_split`, of records, of which each has all its examples in one part."""
    known = sorted(set(records))
    _, held_out = _split(len(known), val_size, seed)
    kept = {known[place] for place in held_out}
    training = [place for place, record in enumerate(records) if record not in kept]
    return training, [place for place, record in enumerate(records) if record in kept]


def check_fit(parts: Sequence[Data], config: Any, virtual: int = 0, longest: int = 0) -> None:
    """Raise ValueError for tokens that the model has no embedding or, after the virtual ones, no position for.

    ``longest`` are the most tokens of a row that is not in ``parts``.
    """
    largest = 0
    for part in parts:
        for index in range(len(part)):
            for name, ids in part[index].items():
                if name.endswith("input_ids"):
                    largest = max(largest, int(ids.max()))
    check_token(largest, config)
    longest, positions = max(longest, *(part.lengths[-1] for part in parts)), config.room
    if longest + virtual > positions:
        after = f" after {virtual} virtual ones" if virtual else ""
        raise ValueError(
            f"rows of {longest} tokens{after} exceed the model's {positions} positions. "
            f"Give --cutoff-len {positions - virtual} or less."
        )


def check_token(largest: int, config: Any) -> None:
    """Raise ValueError for a token that the model has no embedding for."""
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model has {config.vocab_size} tokens. "
            "Take tokenizer and weights from the same checkpoint."
        )


def head_labels(options: ModelOptions | Preview, task: Task, loaded: Loaded) -> HeadLabels | None:
    """The labels that a base model's head is trained on, with the names that an option or the data has for them.

    Raises:
        ValueError: If the options or the records contradict the checkpoint, or the names do not fit.
    """
    if task.labels_of is None:
        return None
    labels = task.labels_of(options.model, loaded.records, options.gguf_file, options.problem_type)
    if options.label_names is not None:
        return with_names(labels, options.label_names)
    return named_by_data(labels, loaded.class_names) if loaded.class_names else labels


def load_base(options: ModelOptions, task: Task, loaded: Loaded, adapter: Path | None) -> Any:
    """Read the base model; a classifier with the classes of the adapter that it is trained on, or of the records."""
    choices: dict[str, Any] = {
        "dtype": options.dtype,
        "load_in_8bit": options.load_in_8bit,
        "load_in_4bit": options.load_in_4bit,
        "keep_quantized": options.keep_quantized,
        "gguf_file": options.gguf_file,
        "remat": options.remat,
    }
    if adapter is not None:
        return task.read_for(options.model, adapter, **choices)
    return task.read(options.model, head_labels(options, task, loaded), **choices)


def is_outlined(options: Finetune, config: PeftConfig) -> bool:
    """Whether the model of a run is known without its weights, as one whose start looks at data is not."""
    of_others = options.base.gguf_file is not None or options.base.keep_quantized
    return not of_others and not (isinstance(config, Method) and starts_from_data(config))


def fingerprint(options: Finetune, config: PeftConfig) -> dict[str, Any]:
    """All that decides a run's numbers: its options, the contents of files they name, and packages of its method."""
    found = settings(options)
    sources = [source.name for source in sources_of(options.data)]
    named = [*sources, options.data.prompt_template, options.adapter.adapter_config]
    if not is_json(options.adapter.peft_config):
        named.append(options.adapter.peft_config)
    if options.adapter.adapter is not None:
        named += [
            options.adapter.adapter / "adapter_model.safetensors",
            options.adapter.adapter / "adapter_config.json",
            options.adapter.adapter / LABELS_FILE,
        ]
    contents = {str(file): _digest(Path(file)) for file in named if file is not None and Path(file).is_file()}
    gguf_file = options.base.gguf_file
    base = find_checkpoint(options.base.model, base_files(gguf_file))
    files = sorted(base.glob("*.safetensors")) if gguf_file is None else [base / gguf_file]
    weights = {file.name: _sample(file) for file in files if file.is_file()}
    if gguf_file is None and (base / "config.json").is_file():
        weights["config.json"] = _digest(base / "config.json")
    contents |= {f"{options.base.model}/{name}": hash for name, hash in weights.items()}
    for package in config.packages if isinstance(config, Method) else ():
        contents[f"the package {package}"] = _version(package)
    return {**found, "contents": contents}


def _version(package: str) -> str:
    """The version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def start_digests(output: Path) -> dict[str, str]:
    """Hashes of the files in a run's folder that hold the adapter's start, which a resumed run reads too."""
    files = sorted(file for file in (output / START).glob("*") if file.is_file())
    return {f"{START}/{file.name}": _digest(file) for file in files}


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sample(file: Path) -> str:
    """Hash of a file's size and of 256 pieces of it, from its first byte to its last: other weights differ there."""
    size, piece, pieces = file.stat().st_size, 2**14, 2**8
    hash = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for n in range(pieces):
            stream.seek(max(0, size - piece) * n // (pieces - 1))
            hash.update(stream.read(piece))
    return hash.hexdigest()


def refuse_others(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if a run was made with other settings than those given now, naming them."""
    options = [name for name in now if name not in ("contents", "tokens")]
    differences = [
        f"{flag(name)} was {_typed(saved.get(name))}, is {_typed(now[name])}"
        for name in options
        if saved.get(name) != now[name]
    ]
    if saved["tokens"] != now.get("tokens", saved["tokens"]):
        differences.append("the data gives other tokens")
    both = saved["contents"].keys() & now["contents"].keys()
    changed = [file for file in sorted(both) if saved["contents"][file] != now["contents"][file]]
    differences += [f"the contents of {file} have changed" for file in changed]
    if differences:
        raise ValueError(
            f"the run was made with other settings: {'; '.join(differences)}. Give those, or start a new run with "
            "another --output."
        )


def _typed(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
