"""`peft-jax demo`: the main job on a checkpoint and on data that ship with the package."""

import dataclasses
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import peft_jax as pj
from peft_jax.cli.command_options import Demo as Demo
from peft_jax.cli.demo_data import HELD_OUT, MODEL, TRAIN
from peft_jax.cli.shared.forward_pass import apply_lazily
from peft_jax.cli.shared.output_folder import new_folder
from peft_jax.cli.shared.progress_bar import progress
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.prompts.tokenizer import Tokenizer, read_tokenizer
from peft_jax.train import (
    Padded,
    Record,
    encode,
    evaluate,
    evaluation_batches,
    make_evaluation_step,
    make_optimizer,
    make_training_step,
    plot_losses,
    read_records,
    start,
    tokenize_prompts,
    train,
    training_batches,
)

Points = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of the demo.

    Attributes:
        r: Rank of the adapter.
        lora_alpha: Numerator of its scale.
        max_steps: Optimizer updates, for the adapter and for its control.
        batch_size: Examples per update.
        learning_rate: Peak of the schedule.
        length: Tokens per example, padding included.
        evaluate_every: Steps between two points of the held-out curve.
        answer_tokens: Longest generated answer.
        held_out: How many held-out items are used.
    """

    r: int = 16
    lora_alpha: float = 32
    max_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-3
    length: int = 96
    evaluate_every: int = 40
    answer_tokens: int = 32
    held_out: int = 200


class Bench:
    """The compiled programs of the demo, each used by the adapter and by its control."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.held_out = read_records(HELD_OUT)[: settings.held_out]
        self.held_out_rows = self.rows(self.held_out)
        self.optimizer = make_optimizer(settings.learning_rate, settings.max_steps)
        self.training_step = make_training_step(apply_lazily, self.optimizer)
        self.evaluation_step = make_evaluation_step(apply_lazily)

    def rows(self, records: Sequence[Record]) -> Padded:
        """Tokenize records and pad them to one length, so that each step is compiled once."""
        length = self.settings.length
        encoded = encode(records, self.tokenizer, cutoff_len=length)
        if encoded.too_long:
            raise ValueError(
                f"{encoded.too_long} records are longer than {length} tokens. Raise the length in Settings."
            )
        return Padded(encoded.examples, length, shortest=length)

    def held_out_loss(self, model: CausalLM) -> float:
        """Mean loss over the held-out items, in nats per answer token."""
        batches = evaluation_batches(self.held_out_rows, self.settings.batch_size)
        return evaluate(self.evaluation_step, model, batches)

    def answers(self, model: CausalLM) -> list[str]:
        """Greedy answers to the held-out instructions."""
        ids, mask = tokenize_prompts(self.held_out, self.tokenizer)
        whole = np.asarray(model.generate(ids, attention_mask=mask, max_new_tokens=self.settings.answer_tokens))
        return [
            text.strip() for text in self.tokenizer.batch_decode(whole[:, ids.shape[1] :], skip_special_tokens=True)
        ]

    def exact(self, answers: Sequence[str]) -> str:
        """Say how many answers are the wanted ones, character by character."""
        hits = sum(answer == record.output for answer, record in zip(answers, self.held_out, strict=True))
        return f"{hits} of {len(answers)} answers exact"

    def train(self, model: CausalLM, data: Padded) -> tuple[Any, Points, Points]:
        """Train an adapter; return the model and its training and held-out curves."""
        settings = self.settings
        batches = training_batches(data, settings.batch_size, seed=0)
        state, frozen = start(model, self.optimizer, seed=0)
        run = train(self.training_step, state, frozen, batches, max_steps=settings.max_steps)
        training, held_out = [], []
        with progress(run, settings.max_steps) as bar:
            for state, metrics in bar:
                number, loss = state.step, float(metrics.loss)
                training.append((number, loss))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if number % settings.evaluate_every == 0 or number == settings.max_steps:
                    held_out.append((number, self.held_out_loss(pj.combine(state.trainable, frozen))))
        return pj.combine(state.trainable, frozen), training, held_out


def demo(options: Demo, settings: Settings = Settings()) -> None:
    """Run the demo.

    Raises:
        OSError: If the output folder is in use, or cannot be written.
    """
    with new_folder(options.output) as folder:
        _demo(folder, settings)
    _say_what_was_written(options.output)


def _demo(folder: Path, settings: Settings) -> None:
    print("peft-jax demo: a LoRA adapter on a small Llama whose weights are in int8\n")
    base = pj.AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
    size, stored = base.num_parameters(), sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    print(f"Model     {size:,} weights in {stored / 1e6:.1f} MB, in float32 they would take {4 * size / 1e6:.1f} MB")
    tokenizer = read_tokenizer(MODEL)
    bench = Bench(tokenizer, settings)
    records = read_records(TRAIN)
    data, control_data = bench.rows(records), bench.rows(with_shuffled_answers(records))
    config = pj.LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = pj.get_peft_model(base, config)  # a fresh adapter changes nothing: this is the base
    print(f"Data      {len(data)} instructions to train on, {len(bench.held_out)} held out")
    print(f"Adapter   LoRA of rank {settings.r} on every linear layer\n  ", end="")
    model.print_trainable_parameters()

    before, base_loss = bench.answers(model), bench.held_out_loss(model)
    print(f"Before    held-out loss {base_loss:.3f}, {bench.exact(before)}", flush=True)
    start = time.monotonic()
    model, training, held_out = bench.train(model, data)
    seconds, after = time.monotonic() - start, bench.answers(model)
    print(f"After     held-out loss {held_out[-1][1]:.3f}, {bench.exact(after)}", end=" ")
    print(f"({settings.max_steps} steps, {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    _, _, control = bench.train(pj.get_peft_model(base, config), control_data)
    seconds, lower = time.monotonic() - start, 1 - held_out[-1][1] / control[-1][1]
    print(f"Control   held-out loss {control[-1][1]:.3f}, the same training on shuffled answers ({seconds:.0f} s)")
    print(f"          The adapter's is {lower:.0%} lower: that much is not the form of answers.")

    print("\nHeld-out instructions, answered greedily before and after:")
    for number in one_of_each(bench.held_out):
        record = bench.held_out[number]
        print(f"\n  {_one_line(f'{record.instruction} {record.input}', 76)}")
        print(f"    before  {_one_line(before[number])}\n    after   {_one_line(after[number])}")
        print(f"    wanted  {_one_line(record.output)}")

    model.save_pretrained(folder / "adapter")
    full = pj.AutoModelForCausalLM.from_pretrained(MODEL)  # merged into the float weights, not into the rounded ones
    pj.PeftModel.from_pretrained(full, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    curves = {
        "training": training,
        "held-out": [(0, base_loss), *held_out],
        "held-out, trained on shuffled answers": [(0, base_loss), *control],
    }
    plot_losses(folder / "loss.png", curves, title="LoRA on an int8 Llama: peft-jax demo")


def with_shuffled_answers(records: Sequence[Record]) -> list[Record]:
    """Records whose answers come from other records of the same instruction: right in form, wrong in content."""
    rng = random.Random(0)
    answers: dict[str, list[str]] = {}
    for record in records:
        answers.setdefault(record.instruction, []).append(record.output)
    for outputs in answers.values():
        rng.shuffle(outputs)
    return [dataclasses.replace(record, output=answers[record.instruction].pop()) for record in records]


def one_of_each(records: Sequence[Record]) -> list[int]:
    """Index of the first record of each instruction."""
    first: dict[str, int] = {}
    for number, record in enumerate(records):
        first.setdefault(record.instruction, number)
    return list(first.values())


def _one_line(text: str, width: int = 66) -> str:
    """A text in one line of a given width."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _say_what_was_written(output: Path) -> None:
    command = "peft-jax" if shutil.which("peft-jax") else sys.argv[0]
    print(f"""
Wrote {output}:
  adapter    in PEFT's format: adapter_config.json, adapter_model.safetensors
  merged     the fine-tuned checkpoint in Hugging Face's format
  loss.png   the loss curve

Next, in PyTorch, the adapter by PEFT or the merged checkpoint by itself:
  PeftModel.from_pretrained(base, "{output}/adapter")
  AutoModelForCausalLM.from_pretrained("{output}/merged")

Or the command for your own model and data, here with the demo's:
  {command} finetune --load-in-8bit --output my-adapter \\
    --model {os.path.relpath(MODEL)} \\
    --data {os.path.relpath(TRAIN)}""")
