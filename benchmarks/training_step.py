"""A training step of LoRA on all linear layers of a Llama: peft_jax beside PyTorch PEFT, and beside the limit.

    python benchmarks/training_step.py --size 30m
    python benchmarks/training_step.py --size 8b --dtype bfloat16 --batch 8 --length 1024     # on a GPU or TPU

Both sides read one random checkpoint and train on one batch, in turn in one process; their first losses have to agree.
Peak memory is taken of each contender in a process of its own. The limit is the time of the products with frozen
weights alone (forward and gradient of the inputs), measured in the same turns, whichever side does them faster.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import measure
import recording
import tyro
from measure import Contender, load_side
from shapes import Dtype, Size, checkpoint_folder, read_shape, token_ids, weight_flops

OURS = ("ours", "ours-bare", "ours-remat")
THEIRS = ("peft", "peft-compiled", "peft-checkpointing")
LIMITS = ("products-jax", "products-torch")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the base; adapters are float32.
        batch: Rows.
        length: Tokens of a row.
        rank: Of the adapters.
        repeats: Turns that are timed.
        contenders: Who is timed. ours-bare trains norms, so that its step has no products of adapters; ours-remat and
            peft-checkpointing recompute the layers in the backward pass; products-* are the limit's.
        memory: Whether each one's peak memory is taken too, in a process of its own.
        build: Folder of checkpoints and records.
        alone: Build and weigh this contender alone, and print its memory.
    """

    size: Size = "30m"
    dtype: Dtype = "float32"
    batch: int = 4
    length: int = 256
    rank: int = 16
    repeats: int = 5
    contenders: tuple[str, ...] = (*OURS, *THEIRS, *LIMITS)
    memory: bool = True
    build: Path = measure.BUILD
    alone: str | None = None


def build(name: str, settings: Settings) -> Contender:
    """Make a contender ready to run.

    Raises:
        NotRun: If it cannot run here.
    """
    checkpoint = checkpoint_folder(settings.build, settings.size, settings.dtype)
    ids = token_ids(read_shape(checkpoint), settings.batch, settings.length)
    side = load_side(name)
    model = side.load(checkpoint, remat=True) if name == "ours-remat" else side.load(checkpoint)
    if name in LIMITS:
        return side.weight_products(name, model, ids.size)
    config = side.norms() if name == "ours-bare" else side.lora(settings.rank)
    theirs = {"compiled": name == "peft-compiled", "checkpointing": name == "peft-checkpointing"}
    return side.training_step(name, side.attach(model, config), ids, **(theirs if name in THEIRS else {}))


def compare(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that the rows allow."""
    asked = [
        ("speed, times PEFT", "peft", "ours"),
        ("speed, times PEFT compiled", "peft-compiled", "ours"),
        ("speed with recomputing, times PEFT checkpointing", "peft-checkpointing", "ours-remat"),
        ("step, times that without the adapters' products", "ours", "ours-bare"),
    ]
    if limits := [rows[name] for name in LIMITS if "median" in rows.get(name, {})]:
        fastest = min(limits, key=lambda one: one["median"])["name"]
        asked += [(f"share of the limit, {name}", fastest, name) for name in (*OURS[:1], *THEIRS[:2])]
    pairs = (("ours", "peft"), ("ours", "peft-checkpointing"), ("ours-remat", "peft-checkpointing"))
    sizes = [(field, above, below) for above, below in pairs for field in ("host_bytes", "device_peak_bytes")]
    return measure.ratios(asked, rows) + measure.memory_ratios(sizes, rows)


def check_losses(rows: dict[str, dict[str, Any]], dtype: Dtype) -> None:
    """Raise RuntimeError unless all contenders start from the same loss, which says that they do the same work."""
    losses = {name: row["loss"] for name, row in rows.items() if "loss" in row}
    if losses and max(losses.values()) - min(losses.values()) > (1e-4 if dtype == "float32" else 2e-2):
        raise RuntimeError(f"the contenders do not do the same work: their first losses are {losses}.")


def main(settings: Settings) -> None:
    """Time the contenders, print what was found and write the record."""
    measure.check_names(settings.contenders, (*OURS, *THEIRS, *LIMITS))
    if any(name in THEIRS or name == "products-torch" for name in settings.contenders):
        measure.require_pytorch(f"Or do without: --contenders {' '.join(OURS)} products-jax")
    if settings.alone is not None:
        found = measure.memory(lambda: build(settings.alone, settings), load_side(settings.alone))
        print(json.dumps(found))
        return
    checkpoint = load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    tokens = settings.batch * settings.length
    rows = measure.contend(settings.contenders, lambda name: build(name, settings), settings.repeats, tokens)
    for name, row in rows.items():
        if name in LIMITS:
            row["flops_per_second"] = weight_flops(read_shape(checkpoint), tokens) / row["median"]
        elif settings.memory and "median" in row:
            row.update(measure.alone(name))
    check_losses(rows, settings.dtype)
    recording.finish("training_step", settings, rows, compare(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
