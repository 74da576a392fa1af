"""`peft-jax eval`: loss and perplexity of a model on a file, or accuracy, with or without an adapter."""

import json
import math
import sys

from peft_jax.cli.command_options import Eval
from peft_jax.cli.finetune.results import in_words
from peft_jax.cli.finetune.setup import check_fit, layout_of_data, padded
from peft_jax.cli.shared.adapter_base import (
    find_task,
    find_tokenizer,
    load_model,
)
from peft_jax.cli.shared.class_numbers import by_names_of
from peft_jax.cli.shared.data_sources import load_records
from peft_jax.cli.shared.head_labels import id2label_of
from peft_jax.cli.shared.micro_rows import choose_micro_layout
from peft_jax.cli.shared.progress_bar import progress
from peft_jax.cli.shared.row_layout import row_options
from peft_jax.cli.shared.task import RowOptions
from peft_jax.cli.shared.training_layout import ANSWERS, EVERYTHING, clash, read_layout
from peft_jax.prompts.base import prompt_tasks, virtual_slots
from peft_jax.train import evaluation_batches
from peft_jax.train.data.encode import Encoded, count_labels


def evaluate_model(options: Eval) -> None:
    """Run the command.

    Raises:
        ValueError: If an option, the data or the checkpoint is unusable.
        OSError: If a file or folder is missing.
    """
    for name in ("batch_size", "cutoff_len"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {given}. Give a number above 0.")
    task = find_task(options.model, options.adapter, options.gguf_file)
    loaded = load_records(options)
    if loaded.weights is not None:
        raise ValueError("--data has weights, and every record is evaluated once. Leave them out.")
    task.check(loaded.records)
    tokenizer = find_tokenizer(options.model, options.adapter, options.gguf_file)
    recorded = read_layout(options.adapter)
    used = layout_of_data(options.prompt_template, recorded, loaded.records, tokenizer, task)
    if note := clash(recorded, [used], tokenizer):
        print(note, file=sys.stderr)
    model = load_model(options, task)
    if task.has_classes:
        known = len(loaded.notes)
        loaded = by_names_of(loaded, id2label_of(model))
        for note in loaded.notes[known:]:
            print(note, file=sys.stderr)
    everything = recorded is not None and recorded.learned == EVERYTHING
    virtual, tasks = virtual_slots(model), prompt_tasks(model)
    layout = row_options(options, model.config, used.layout, virtual=virtual, train_on_inputs=everything, tasks=tasks)
    encoded = task.encode(loaded.records, tokenizer, model, layout)
    examples = encoded.examples
    problem = task.problem_of(model, loaded.records, encoded)
    data = padded(task, examples, layout.cutoff_len, model)
    check_fit([data], model.config, virtual_slots(model))
    rows = choose_micro_layout(task, model, [data], options.batch_size)
    batches = list(evaluation_batches(data, rows.rows, rows))
    with progress(batches, len(batches)) as bar:
        found = task.make_evaluation(problem)(model, bar)
    if not math.isfinite(found["loss"]):
        raise ValueError(
            f"the loss is {found['loss']}: what the model computes is not finite. Give --dtype float32, or another "
            "checkpoint or adapter."
        )
    if task.writes:
        found["perplexity"] = math.exp(found["loss"]) if found["loss"] < 700 else math.inf
    targets = count_labels(examples)
    if options.json:
        printed: dict[str, float | int | None] = dict(found)
        for name, value in found.items():
            if not math.isfinite(value):
                printed[name] = None  # JSON has no infinity, nor the correlation of equal numbers
        if task.writes:
            printed["target_tokens"] = targets
        printed |= {"examples": len(data), "too_long": encoded.too_long}
        if encoded.shortened:
            printed["shortened"] = encoded.shortened
        print(json.dumps(printed))
        return
    left_out = _said_of_length(encoded, layout)
    if not task.writes:
        print(f"Data        {len(data)} texts{left_out}")
        unit = "nats a text" if problem is None else problem.unit
        print(f"Loss        {found.pop('loss'):.4f} {unit}")
        for name, value in found.items():
            said = f"{value:.4f}" if math.isfinite(value) else "not defined, as all predictions or labels are equal"
            print(f"{in_words(name).capitalize():<11} {said}")
        return
    learned = f"{EVERYTHING}, as in training" if everything else ANSWERS
    print(f"Data        {len(data)} examples, {targets} tokens of {learned}{left_out}")
    print(f"Loss        {found['loss']:.4f} nats a token")
    print(f"Perplexity  {found['perplexity']:.4g}")


def _said_of_length(encoded: Encoded, layout: RowOptions) -> str:
    """The examples that are longer than a row, in words behind the others."""
    done = "split" if layout.long == "split" else "cut"
    said = f", {encoded.shortened} longer than {layout.cutoff_len} {done}" if encoded.shortened else ""
    return said + (f", {encoded.too_long} longer than {layout.cutoff_len} left out" if encoded.too_long else "")
