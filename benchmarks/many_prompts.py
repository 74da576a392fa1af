"""Answers to many prompts with a LoRA adapter: in rows that take the next prompt, in batches, and in PEFT.

    python benchmarks/many_prompts.py --size 30m

Prompts and answers are of unlike lengths, as a share of all tokens ends an answer. Decoding is greedy, and the answers
of all contenders are compared. They run on one core, and what is timed is the processor's time, so that no waiting
thread counts.
"""

import dataclasses
import os
import time
from pathlib import Path

import measure
import numpy as np
import recording
import tyro
from measure import Contender, load_side
from shapes import Dtype, Size, checkpoint_folder, read_shape, token_ids

CONTENDERS = ("filled rows", "batches", "peft")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the base; adapters are float32.
        prompts: How many prompts are answered.
        rows: Answers that are written at once.
        prompt: Tokens of the longest prompt; the shortest has half of them.
        longest: The most tokens of an answer.
        ending: One token of so many ends an answer.
        rank: Of the adapter.
        repeats: Turns that are timed.
        contenders: Whose runs are timed.
        build: Folder of checkpoints and records.
    """

    size: Size = "30m"
    dtype: Dtype = "float32"
    prompts: int = 32
    rows: int = 8
    prompt: int = 32
    longest: int = 64
    ending: int = 24
    rank: int = 16
    repeats: int = 5
    contenders: tuple[str, ...] = CONTENDERS
    build: Path = measure.BUILD


def check(settings: Settings) -> None:
    """Raise SystemExit for settings that cannot be."""
    measure.check_names(settings.contenders, CONTENDERS)
    for name in ("prompts", "rows", "prompt", "longest", "ending"):
        if getattr(settings, name) < 1:
            raise SystemExit(f"--{name} is {getattr(settings, name)}. Give 1 or more.")
    if "peft" in settings.contenders:
        measure.require_pytorch("Or do without: --contenders 'filled rows' batches")


def draw_prompts(vocabulary: dict[str, int], settings: Settings) -> list[np.ndarray]:
    """Prompts of random tokens and lengths, the same on every call."""
    ids = token_ids(vocabulary, settings.prompts, settings.prompt)
    lengths = np.random.default_rng(1).integers(max(1, settings.prompt // 2), settings.prompt + 1, settings.prompts)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def main(settings: Settings) -> None:
    """Time the contenders, print what was found and write the record.

    Raises:
        RuntimeError: If the answers differ, so that it is not the same work.
    """
    check(settings)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the libraries count the cores
    load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    checkpoint = checkpoint_folder(settings.build, settings.size, settings.dtype)
    folder = settings.build / "adapters" / f"{settings.size}-{settings.dtype}-{settings.rank}"
    load_side("ours").random_adapter(checkpoint, settings.rank, folder)
    shape = read_shape(checkpoint)
    prompts, ends = draw_prompts(shape, settings), range(1, shape["vocab_size"], settings.ending)
    runs, answers = {}, {}
    for name in settings.contenders:
        side = load_side(name)
        model = side.with_adapter(side.load(checkpoint), folder)
        options = {} if name == "peft" else {"filled": name == "filled rows"}
        runs[name] = side.answering(model, prompts, settings.rows, ends, settings.longest, **options)
        answers[name] = runs[name]()
    first = answers[settings.contenders[0]]
    for name, found in answers.items():
        differ = np.mean([mine != yours for mine, yours in zip(first, found, strict=True)])
        # Where two tokens are equally likely, all that follows may differ.
        if settings.dtype == "float32" and differ > 0.1:
            raise RuntimeError(f"{name}: {differ:.0%} of the answers differ: not the same work.")
    tokens = sum(map(len, first))
    contenders = [Contender(name, run, {"answer_tokens": tokens}) for name, run in runs.items()]
    times = measure.interleave(contenders, settings.repeats, clock=time.process_time)
    rows = {one.name: measure.row(one, times[one.name], tokens) for one in contenders}
    asked = [
        ("speed, many prompts in filled rows, times PEFT", "peft", "filled rows"),
        ("speed, many prompts in filled rows, times batches", "batches", "filled rows"),
    ]
    recording.finish("many_prompts", settings, rows, measure.ratios(asked, rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
