"""An int8 base beside a dense one: LoRA training steps and decoding, their speed and memory.

    python benchmarks/int8_base.py --size 125m --dtype bfloat16
    python benchmarks/int8_base.py --size 8b --dtype bfloat16 --batch 8 --length 512           # on a GPU or TPU

peft_jax with `load_in_8bit` against itself without, and against PEFT on bitsandbytes where that runs. Both sides read
one random checkpoint, in turn in one process; peak memory is taken of each contender in a process of its own. The
embedding and the output head stay dense on both sides. That no dense copy is kept for the backward pass is what
int8_residuals.py shows.
"""

import dataclasses
import json
from pathlib import Path

import measure
import recording
import tyro
from measure import Contender, load_side
from shapes import Dtype, Size, checkpoint_folder, read_shape, token_ids

STEPS = ("dense", "int8", "peft-int8")
DECODING = ("decode-dense", "decode-int8", "decode-peft-int8")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the dense base and of all that is computed; adapters are float32.
        batch: Rows.
        length: Tokens of a row, or of a prompt.
        new: Tokens that are generated.
        rank: Of the adapters.
        repeats: Turns that are timed.
        contenders: Who is timed: three training steps, three generations.
        remat: Whether the training steps recompute the layers in the backward pass, on both sides.
        memory: Whether the peak memory of the steps is taken too, each in a process of its own.
        build: Folder of checkpoints and records.
        alone: Build and weigh this contender alone, and print its memory.
    """

    size: Size = "125m"
    dtype: Dtype = "bfloat16"
    batch: int = 1
    length: int = 128
    new: int = 16
    rank: int = 16
    repeats: int = 5
    contenders: tuple[str, ...] = (*STEPS, *DECODING)
    remat: bool = True
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
    side, peft = load_side(name), "peft" in name
    if peft:
        model = side.load_in_8bit(checkpoint)
    else:
        model = side.load(checkpoint, load_in_8bit="int8" in name, remat=settings.remat and name in STEPS)
    if name in STEPS:
        options = {"checkpointing": settings.remat} if peft else {}  # ours is loaded with it
        return side.training_step(name, side.attach(model, side.lora(settings.rank)), ids, **options)
    generate = side.generator(side.with_adapters(model, settings.rank, 1), ids)
    return Contender(name, lambda: generate(settings.new))


def main(settings: Settings) -> None:
    """Time the contenders, print what was found and write the record."""
    measure.check_names(settings.contenders, (*STEPS, *DECODING))
    if any("peft" in name for name in settings.contenders):
        measure.require_pytorch("Or do without: --contenders dense int8 decode-dense decode-int8")
    if settings.alone is not None:
        found = measure.memory(lambda: build(settings.alone, settings), load_side(settings.alone))
        print(json.dumps(found))
        return
    load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    steps, generations = (
        measure.contend(
            [name for name in settings.contenders if name in kind],
            lambda name: build(name, settings),
            settings.repeats,
            settings.batch * tokens,
        )
        for kind, tokens in ((STEPS, settings.length), (DECODING, settings.new))
    )
    for name, row in steps.items():
        if settings.memory and "median" in row:
            row.update(measure.alone(name))
    rows = steps | generations
    asked = [
        ("step speed, times dense", "dense", "int8"),
        ("step speed, times PEFT on bitsandbytes", "peft-int8", "int8"),
        ("decode speed, times dense", "decode-dense", "decode-int8"),
        ("decode speed, times PEFT on bitsandbytes", "decode-peft-int8", "decode-int8"),
    ]
    fields = ("host_bytes", "device_peak_bytes", "xla_bytes")
    sizes = [(field, "int8", other) for other in ("dense", "peft-int8") for field in fields]
    recording.finish("int8_base", settings, rows, measure.ratios(asked, rows) + measure.memory_ratios(sizes, rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
