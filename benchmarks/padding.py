"""Padding: how many tokens are computed for each real one, and what a real token costs, for texts of unlike lengths.

    python benchmarks/padding.py --size 30m

Lengths are lognormal, as those of instruction data are. The layouts of `peft-jax finetune` are counted for batches of
two sizes. Then a few batches are trained on: packed, or with one text a row; and in PEFT as they come, each micro batch
padded by itself, or with texts of like length in a batch, as the Trainer's ``group_by_length`` has them. All contenders
train on the same texts, on one core, and what is timed is the processor's time, so that no waiting thread counts.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import recording
import tyro
from measure import Contender, load_side
from shapes import SHAPES, Dtype, Size, checkpoint_folder

CONTENDERS = ("packed", "one text a row", "peft", "peft grouped")
COUNTED = (16, 128)  # the sizes of batches whose tokens are counted
TEXTS = 4096  # whose tokens are counted


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the base; adapters are float32.
        batch: Texts of a step.
        micro: Rows that go through the model at once.
        steps: Steps that are timed together.
        mean: Tokens of a text on average.
        longest: The most tokens of a text.
        rank: Of the adapters.
        repeats: Turns that are timed.
        contenders: Whose steps are timed.
        build: Folder of checkpoints and records.
    """

    size: Size = "30m"
    dtype: Dtype = "float32"
    batch: int = 16
    micro: int = 4
    steps: int = 4
    mean: float = 97
    longest: int = 512
    rank: int = 16
    repeats: int = 3
    contenders: tuple[str, ...] = CONTENDERS
    build: Path = measure.BUILD


def draw_lengths(count: int, settings: Settings) -> list[int]:
    """Lengths of texts, the same on every call."""
    spread = 0.9
    drawn = np.random.default_rng(0).lognormal(np.log(settings.mean) - spread**2 / 2, spread, count)
    return np.clip(drawn, 4, settings.longest).astype(int).tolist()


def in_batches(texts: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Texts in turn, ``size`` in each; a rest is left out."""
    return [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]


def counts(settings: Settings) -> list[dict[str, Any]]:
    """The ratios of computed to real tokens."""
    lengths, found = draw_lengths(TEXTS, settings), []
    computed_tokens, hidden_size = load_side("ours").computed_tokens, SHAPES[settings.size]["hidden_size"]
    for size in COUNTED:
        batches = in_batches(lengths, size)
        real = sum(map(sum, batches))
        computed = {
            "packed": computed_tokens(batches, size, settings.micro, packed=True, hidden_size=hidden_size),
            "one text a row": computed_tokens(batches, size, settings.micro, packed=False, hidden_size=hidden_size),
            "each micro batch padded by itself": computed_by_padding(batches, settings.micro),
        }
        for name, count in computed.items():
            what = f"computed over real tokens, {name}, batch {size}"
            found.append({"what": what, "above": "computed", "below": "real", "median": count / real})
    return found


def computed_by_padding(batches: Sequence[Sequence[int]], micro: int) -> int:
    """Tokens that are computed where each micro batch is padded to its longest text."""
    return sum(len(part) * max(part) for batch in batches for part in in_batches(batch, micro))


def contender(name: str, settings: Settings) -> Contender:
    """Trains on all texts once."""
    checkpoint, side = checkpoint_folder(settings.build, settings.size, settings.dtype), load_side(name)
    draw = np.random.default_rng(1)
    lengths = draw_lengths(settings.batch * settings.steps, settings)
    texts = [draw.integers(1, SHAPES[settings.size]["vocab_size"], length, dtype=np.int32) for length in lengths]
    if name == "peft grouped":
        texts.sort(key=len)
    model = side.attach(side.load(checkpoint), side.lora(settings.rank))
    batches = in_batches(texts, settings.batch)
    if side.__name__ == "theirs":
        return side.training_on_texts(name, model, [in_batches(batch, settings.micro) for batch in batches])
    return side.training_on_texts(name, model, batches, settings.micro, packed=name == "packed")


def check(settings: Settings) -> None:
    """Raise SystemExit for settings that cannot be."""
    measure.check_names(settings.contenders, CONTENDERS)
    if settings.batch % settings.micro:
        raise SystemExit(f"--micro {settings.micro} does not divide --batch {settings.batch}. Give a divisor of it.")
    if any("peft" in name for name in settings.contenders):
        measure.require_pytorch("Or do without: --contenders packed")


def main(settings: Settings) -> None:
    """Count, time the contenders, print what was found and write the record."""
    check(settings)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before the libraries count the cores
    load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    tokens = sum(draw_lengths(settings.batch * settings.steps, settings))
    rows = measure.contend(
        settings.contenders,
        lambda name: contender(name, settings),
        settings.repeats,
        tokens,
        clock=time.process_time,
    )
    asked = [("packed, processor time over PEFT's", "packed", "peft")]
    asked.append(("packed, processor time over PEFT's grouped by length", "packed", "peft grouped"))
    asked.append(("one text a row, processor time over PEFT's", "one text a row", "peft"))
    recording.finish("padding", settings, rows, counts(settings) + measure.ratios(asked, rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
