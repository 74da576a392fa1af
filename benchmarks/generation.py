"""Greedy generation with a LoRA adapter on a Llama: peft_jax beside transformers with PEFT, both with a cache.

    python benchmarks/generation.py --size 30m
    python benchmarks/generation.py --size 8b --dtype bfloat16 --prompt 512 --new 128          # on a GPU or TPU

One adapter unmerged and merged, then batches whose rows have 1, 8 and 64 different adapters (`with_adapter_rows` here,
``adapter_names=`` there). A run with one new token is the prefill; what a run with more takes beyond that, in the same
turn, is decoding. Both sides read one random checkpoint, and with one adapter, the same for both, their tokens are
compared.
"""

import dataclasses
from pathlib import Path
from typing import Any

import measure
import numpy as np
import recording
import tyro
from measure import Contender, load_side
from shapes import Dtype, Size, checkpoint_folder, read_shape, token_ids

SIDES = ("ours", "peft")
KINDS = ("unmerged", "merged")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the base; adapters are float32.
        batch: Rows with one adapter.
        rows: Rows of the batches with several.
        adapters: How many different ones such a batch has; each divides the rows.
        prompt: Tokens of a prompt.
        new: Tokens that follow; the first one is the prefill's.
        rank: Of the adapters.
        repeats: Turns that are timed.
        contenders: Whose runs are timed.
        build: Folder of checkpoints and records.
    """

    size: Size = "30m"
    dtype: Dtype = "float32"
    batch: int = 8
    rows: int = 64
    adapters: tuple[int, ...] = (1, 8, 64)
    prompt: int = 64
    new: int = 17
    rank: int = 16
    repeats: int = 3
    contenders: tuple[str, ...] = SIDES
    build: Path = measure.BUILD


def check(settings: Settings) -> None:
    """Raise SystemExit for settings that cannot be."""
    measure.check_names(settings.contenders, SIDES)
    if wrong := [count for count in settings.adapters if count < 1 or settings.rows % count]:
        raise SystemExit(f"--adapters {wrong[0]} does not divide --rows {settings.rows}. Give divisors of it.")
    if settings.new < 2:
        raise SystemExit(f"--new {settings.new} leaves nothing to decode after the prefill. Give 2 or more.")
    if "peft" in settings.contenders:
        measure.require_pytorch("Or do without: --contenders ours")


def generators(settings: Settings) -> dict[str, Any]:
    """What generates ``(new tokens) -> ids``, by kind and side: ``unmerged: ours`` and so on."""
    checkpoint = checkpoint_folder(settings.build, settings.size, settings.dtype)
    folder = settings.build / "adapters" / f"{settings.size}-{settings.dtype}-{settings.rank}"
    load_side("ours").random_adapter(checkpoint, settings.rank, folder)
    ids = token_ids(read_shape(checkpoint), settings.rows, settings.prompt)
    found = {}
    for kind in KINDS:
        for name in settings.contenders:
            side = load_side(name)
            model = side.with_adapter(side.load(checkpoint), folder, merged=kind == "merged")
            found[f"{kind}: {name}"] = side.generator(model, ids[: settings.batch])
    for count in settings.adapters:
        for name in settings.contenders:
            side = load_side(name)
            model = side.with_adapters(side.load(checkpoint), settings.rank, count)
            rows = [f"a{row % count}" for row in range(settings.rows)]
            found[f"{count} in a batch: {name}"] = side.generator(model, ids, rows)
    return found


def check_tokens(generate: dict[str, Any], settings: Settings) -> None:
    """Raise RuntimeError unless both sides generate the same with one adapter: they are to do the same work."""
    if settings.dtype != "float32" or len(settings.contenders) < 2:
        return
    for kind in KINDS:
        mine, yours = (np.asarray(generate[f"{kind}: {name}"](settings.new)) for name in SIDES)
        if (mine == yours).mean() < 0.9:  # in one row two tokens may be equally likely, and all that follows differs
            raise RuntimeError(f"{kind}, {np.mean(mine != yours):.0%} of the tokens differ: not the same work.")


def split(times: dict[str, list[float]], settings: Settings) -> dict[str, dict[str, Any]]:
    """Rows of prefill and decoding, from the times of runs with one and with all new tokens."""
    rows = {}
    for name in [name.removesuffix(" prefill") for name in times if name.endswith(" prefill")]:
        batch = settings.batch if name.split(":")[0] in KINDS else settings.rows
        first, whole = times[f"{name} prefill"], times[f"{name} whole"]
        rest = [a - b for a, b in zip(whole, first, strict=True)]
        for part, seconds, tokens in (("prefill", first, settings.prompt), ("decode", rest, settings.new - 1)):
            one = f"{name} {part}"
            if min(seconds) > 0:
                rows[one] = measure.row(Contender(one, lambda: None), seconds, batch * tokens)
            else:
                rows[one] = {"name": one, "not_run": "too short to be separated from the prefill; give a larger --new"}
    return rows


def main(settings: Settings) -> None:
    """Time the contenders, print what was found and write the record."""
    check(settings)
    load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    generate = generators(settings)
    check_tokens(generate, settings)
    contenders = [
        Contender(f"{name} {part}", lambda run=run, count=count: run(count))
        for name, run in generate.items()
        for part, count in (("prefill", 1), ("whole", settings.new))
    ]
    rows = split(measure.interleave(contenders, settings.repeats), settings)
    kinds = [*KINDS, *(f"{count} in a batch" for count in settings.adapters)]
    asked = [
        (f"{part} speed, {kind}, times PEFT", f"{kind}: peft {part}", f"{kind}: ours {part}")
        for kind in kinds
        for part in ("prefill", "decode")
    ]
    fewest, most = min(settings.adapters), max(settings.adapters)
    asked += [
        (
            f"decode time, {most} adapters over {fewest}, {name}",
            *(f"{n} in a batch: {name} decode" for n in (most, fewest)),
        )
        for name in settings.contenders
    ]
    recording.finish("generation", settings, rows, measure.ratios(asked, rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
