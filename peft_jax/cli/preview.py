"""`peft-jax preview`: the tokens that a model would see of the data, and which of them are learned."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from peft_jax.cli.command_options import Preview
from peft_jax.cli.finetune.setup import head_labels, layout_of_data
from peft_jax.cli.finetune.streaming import Streams, load_streams, said_of_streams
from peft_jax.cli.shared.class_numbers import by_names_of
from peft_jax.cli.shared.data_options import check_streaming
from peft_jax.cli.shared.data_sources import Loaded, load_records
from peft_jax.cli.shared.preview_page import Part, Shown, page, painted
from peft_jax.cli.shared.row_layout import row_options, said_of_chats, said_of_length
from peft_jax.cli.shared.task import check_options, task_of
from peft_jax.cli.shared.terminal import obeyed
from peft_jax.models.gguf_checkpoint import base_config
from peft_jax.models.registry import read_architecture
from peft_jax.prompts.tokenizer import Tokenizer, read_tokenizer
from peft_jax.train.data.encode import IGNORE, Example, count_labels
from peft_jax.train.data.long_examples import has_numbers


def preview(options: Preview) -> None:
    """Run the command. It reads the model's config and tokenizer, and no weights.

    Raises:
        ValueError: If an option, the data or the checkpoint is unusable.
        OSError: If a file or folder is missing, or the page cannot be written.
    """
    for name in ("examples", "cutoff_len"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}. Give a number above 0.")
    check_streaming(vars(options))
    task = task_of(options.model, options.task, options.gguf_file)
    check_options(task, vars(options))
    loaded: Loaded = load_streams(options) if options.streaming else load_records(options)
    task.check(loaded.records)
    config: Any = read_architecture(base_config(options.model, options.gguf_file))
    classes: Mapping[int, str] = {}
    if (labels := head_labels(options, task, loaded)) is not None:
        classes = labels.id2label or {}
        config = dataclasses.replace(config, num_labels=len(classes), problem_type=labels.problem_type)
        loaded = by_names_of(loaded, classes)
    # The encoders of tasks read these two of a model alone.
    model: Any = SimpleNamespace(config=config, source=SimpleNamespace(id2label=classes))
    tokenizer = read_tokenizer(options.model, gguf_file=options.gguf_file)
    used = layout_of_data(options.prompt_template, None, loaded.records, tokenizer, task)
    layout = row_options(options, config, used.layout, virtual=0, train_on_inputs=options.train_on_inputs)
    encoded = task.encode(loaded.records, tokenizer, model, layout)
    shown = [_shown(example, tokenizer, classes) for example in encoded.examples[: options.examples]]
    said = [said_of_streams(loaded)] if isinstance(loaded, Streams) else []
    said += [_counts(encoded.examples), said_of_length(encoded, layout)]
    said += [*loaded.notes, *said_of_chats(loaded.records, tokenizer)]
    if options.html is not None:
        _write(options.html, page(shown, said))
        said.append(f"Wrote {options.html}.")
    is_colored = sys.stdout.isatty()
    print(painted(shown, colored=is_colored), file=obeyed() if is_colored else sys.stdout)
    print("\n".join(said))


def _shown(example: Example, tokenizer: Tokenizer, classes: Mapping[int, str]) -> Shown:
    """An example as texts of tokens."""
    ids, labels = example.input_ids, example.labels
    if labels.shape == ids.shape and not has_numbers(labels) and "decoder_input_ids" not in example.more:
        return Shown(_parts(ids, labels != IGNORE, tokenizer))
    if "ends" in example.more:
        places = np.arange(ids.size)
        return Shown(_parts(ids, (places >= labels) & (places <= example.more["ends"]), tokenizer))
    given = _parts(ids, np.zeros(ids.shape, bool), tokenizer)
    if has_numbers(labels):
        return Shown(given, label=_numbers_in_words(labels, classes))
    if labels.ndim == 0:
        return Shown(given, label=classes.get(int(labels), str(int(labels))))
    return Shown([*given, Part("\n", None), *_parts(labels, labels != IGNORE, tokenizer)])


def _numbers_in_words(labels: np.ndarray, classes: Mapping[int, str]) -> str:
    """The values of a head's outputs by their names."""
    return ", ".join(f"{classes.get(number, number)}={value:g}" for number, value in enumerate(labels.tolist()))


def _parts(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> list[Part]:
    """The texts of tokens. A character of several tokens is written behind the last of them."""
    parts: list[Part] = []
    before = ""
    waiting: list[int] = []
    for number, is_learned in zip(ids.tolist(), learned.tolist(), strict=True):
        waiting.append(number)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(waiting) < 8:
            parts.append(Part("", is_learned))
            continue
        parts.append(Part(text.removeprefix(before), is_learned))
        # The token before decides whether a decoder writes the space of the next one.
        waiting = [number]
        before = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
    return parts


def _counts(examples: list[Example]) -> str:
    """A sentence on the tokens of all examples."""
    lengths = [example.input_ids.size for example in examples]
    learned = count_labels(examples)
    return (
        f"{len(examples)} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; {learned} labels "
        "are learned."
    )


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror}. Name another file with --html.") from error
