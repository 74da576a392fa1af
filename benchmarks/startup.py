"""Start-up: imports, reading, adapter files, a short answer, and the first step as depth grows; PEFT beside.

    python benchmarks/startup.py --size 30m
    python benchmarks/startup.py --size 1b --dtype bfloat16 --depths 4 16

The first step is timed from the loaded base to the end of the step: attach LoRA, trace, compile, run; nothing compiled
before is kept. peft_jax's models scan over their layers, so that its compiler sees one layer at any depth (what
layers cost that are not in a scan, adapt_overhead.py prints). PEFT's first step is eager and compiles nothing.

Peak memory is taken in processes of their own: of reading the checkpoint, and of reading it and one short answer.
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import measure
import numpy as np
import recording
import tyro
from measure import Contender, load_side
from safetensors.numpy import load_file
from shapes import SHAPES, Dtype, Size, checkpoint_folder, token_ids

SIDES = ("ours", "peft")
READING, ANSWER = "read the checkpoint", "answer a prompt"
SPARE = 500 * 2**20  # bytes that an answer may take beside 1.5 times the weights
IMPORTS = {  # of a name alone peft_jax imports nothing: what reading a Llama and training it import is named here
    "ours": (
        "from peft_jax import AutoModelForCausalLM, LoraConfig, get_peft_model; import peft_jax.models.llama.model; "
        "from peft_jax.train import make_training_step; import transformers.models.llama.configuration_llama"
    ),
    "peft": "from peft import LoraConfig, get_peft_model; from transformers import LlamaForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and who does it.

    Attributes:
        size: The Llama's shape.
        dtype: Of the base; adapters are float32.
        depths: Layers of the models whose first step is timed; the other sizes are those of the shape.
        batch: Rows of the first step.
        length: Tokens of such a row.
        rank: Of the adapters.
        repeats: Turns that are timed, of imports and first steps.
        turns: Turns of all else, which is quick.
        contenders: Whose runs are timed.
        memory: Whether the peak memory of reading the checkpoint and of an answer is taken too.
        prompt: Tokens of the prompt that is answered.
        answer: Tokens of the answer.
        build: Folder of checkpoints and records.
        alone: Do one thing on one side alone, as in "answer a prompt: ours", and print its memory.
    """

    size: Size = "30m"
    dtype: Dtype = "float32"
    depths: tuple[int, ...] = (4, 16, 64)
    batch: int = 1
    length: int = 32
    rank: int = 16
    repeats: int = 3
    turns: int = 7
    contenders: tuple[str, ...] = SIDES
    memory: bool = True
    prompt: int = 16
    answer: int = 16
    build: Path = measure.BUILD
    alone: str | None = None


def imported(name: str) -> Contender:
    """Starts Python and imports what reading a model and training it with LoRA need."""
    command = [sys.executable, "-c", IMPORTS[name]]
    return Contender(f"import: {name}", lambda: subprocess.run(command, check=True, capture_output=True))


def files(name: str, settings: Settings) -> list[Contender]:
    """Reads the checkpoint, attaches an adapter, writes it and reads it."""
    side = load_side(name)
    checkpoint = checkpoint_folder(settings.build, settings.size, settings.dtype)
    folder = settings.build / "adapters" / f"startup-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    bases = [side.load(checkpoint) for _ in range(2)]
    attached = side.attach(bases[0], side.lora(settings.rank))
    work: dict[str, Callable[[], Any]] = {
        READING: lambda: side.load(checkpoint),
        "attach LoRA": lambda: side.attach_and_detach(bases[1], side.lora(settings.rank)),
        "write the adapter": lambda: attached.save_pretrained(folder),
        "read the adapter": lambda: side.read_and_detach(bases[1], folder),
        ANSWER: lambda: answer(side, bases[1], settings),
    }
    work["write the adapter"]()
    before = {READING: memory_for(checkpoint)}
    return [Contender(f"{what}: {name}", run, before=before.get(what)) for what, run in work.items()]


def memory_for(checkpoint: Path) -> Callable[[], None]:
    """Takes memory for reading a checkpoint, and gives it back."""
    return functools.partial(measure.take_memory, 2 * weights_of(checkpoint))


def weights_of(checkpoint: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def answer(side: Any, model: Any, settings: Settings) -> None:
    """Answer a prompt, greedily."""
    ids = token_ids(SHAPES[settings.size], 1, settings.prompt)
    side.generator(model, ids)(settings.answer)


def own_time_of_safetensors(settings: Settings) -> Contender:
    """Reads the checkpoint's bytes by safetensors and casts them, which is the least that reading can take."""
    checkpoint = checkpoint_folder(settings.build, settings.size, settings.dtype)
    dtype = jnp.dtype(settings.dtype)

    def read() -> list[np.ndarray]:
        files = checkpoint.glob("*.safetensors")
        return [tensor.astype(dtype, copy=False) for file in files for tensor in load_file(file).values()]

    return Contender(f"{READING}: safetensors", read, before=memory_for(checkpoint))


def first_steps(settings: Settings) -> dict[str, dict[str, Any]]:
    """Rows of the first step at each depth, with its parts; all depths in turn, since their ratios are asked."""
    contenders: list[Contender] = []
    parts: dict[tuple[int, str], list[dict[str, float]]] = {}
    for depth in settings.depths:
        shape = {**SHAPES[settings.size], "num_hidden_layers": depth}
        ids = token_ids(shape, settings.batch, settings.length)
        for name in settings.contenders:
            parts[depth, name] = []
            contenders.append(stepping(name, shape, settings, ids, parts[depth, name]))

    times = measure.interleave(contenders, settings.repeats)
    found = {one.name: measure.row(one, times[one.name]) for one in contenders}
    for (depth, name), seconds in parts.items():
        for part in seconds[0]:
            one = f"{part}, {depth} layers: {name}"
            found[one] = measure.row(Contender(one, lambda: None), [turn[part] for turn in seconds[1:]])
    return found


def stepping(name: str, shape: dict[str, Any], settings: Settings, ids: np.ndarray, parts: list[Any]) -> Contender:
    """Takes the first step of a fresh run, and adds the seconds of its parts to ``parts``."""
    side = load_side(name)
    base = side.random_model(shape, settings.dtype)
    return Contender(
        f"first step, {shape['num_hidden_layers']} layers: {name}",
        lambda: parts.append(side.first_step(base, side.lora(settings.rank), ids)),
    )


def weigh(task: str, settings: Settings) -> dict[str, Any]:
    """What a task takes at its peak, and what it leaves, in bytes beside imports and an idle device."""
    side = load_side(task)
    side.wake()
    imported = measure.status("VmRSS")
    model = side.load(checkpoint_folder(settings.build, settings.size, settings.dtype))
    if task.startswith(ANSWER):
        answer(side, model, settings)
    peak, after = measure.status("VmHWM"), measure.status("VmRSS")
    del model
    if imported is None or peak is None or after is None:
        return {"host_peak_bytes": None, "host_bytes": None}
    return {"host_peak_bytes": peak - imported, "host_bytes": after - imported}


def compare(rows: dict[str, dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """The ratios that the rows allow."""
    kinds = ["import", READING, "attach LoRA", "write the adapter", "read the adapter", ANSWER]
    kinds += [f"first step, {depth} layers" for depth in settings.depths]
    asked = [(f"{kind}, time over PEFT's", f"{kind}: ours", f"{kind}: peft") for kind in kinds]
    asked.append((f"{READING}, time over safetensors' own", f"{READING}: ours", f"{READING}: safetensors"))
    few, many = min(settings.depths), max(settings.depths)
    for part in ("trace", "compile", "first step"):
        over = f"{part}, {many} layers over {few}"
        asked += [(f"{over}, {name}", *(f"{part}, {n} layers: {name}" for n in (many, few))) for name in SIDES]
    sizes = [("host_peak_bytes", f"{kind}: ours", f"{kind}: peft") for kind in (READING, ANSWER)]
    return measure.ratios(asked, rows) + measure.memory_ratios(sizes, rows) + beside_weights(rows)


def beside_weights(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The peak memory of an answer, over 1.5 times the weights and `SPARE`."""
    found = []
    for name in SIDES:
        row = rows.get(f"{ANSWER}: {name}", {})
        if peak := row.get("host_peak_bytes"):
            bound = 1.5 * row["file_bytes"] + SPARE
            what = f"host peak memory, {ANSWER}: {name} over 1.5 times the weights and 500 MiB"
            found.append({"what": what, "above": row["name"], "below": "the bound", "median": peak / bound})
    return found


def main(settings: Settings) -> None:
    """Time the contenders, print what was found and write the record."""
    measure.check_names(settings.contenders, SIDES)
    if min(settings.depths) < 1:
        raise SystemExit(f"--depths {min(settings.depths)} is no number of layers. Give 1 or more.")
    if "peft" in settings.contenders:
        measure.require_pytorch("Or do without: --contenders ours")
    if settings.alone is not None:
        print(json.dumps(weigh(settings.alone, settings)))
        return
    checkpoint = load_side("ours").random_checkpoint(settings.build, settings.size, settings.dtype)
    imports = [imported(name) for name in settings.contenders]
    sides = [files(name, settings) for name in settings.contenders]
    contenders = [side[place] for place in range(len(sides[0])) for side in sides]
    contenders.append(own_time_of_safetensors(settings))
    # Imports apart: on a virtual machine the memory that their processes freed is slow for whoever needs it next.
    times = measure.interleave(imports, settings.repeats) | measure.interleave(contenders, settings.turns)
    rows = {one.name: measure.row(one, times[one.name]) for one in (*imports, *contenders)}
    weights = weights_of(checkpoint)
    tasks = [f"{kind}: {name}" for kind in (READING, ANSWER) for name in settings.contenders]
    for task in tasks if settings.memory else ():
        rows[task] |= {"file_bytes": weights, **measure.alone(task)}
    rows |= first_steps(settings)
    recording.finish("startup", settings, rows, compare(rows, settings))


if __name__ == "__main__":
    main(tyro.cli(Settings))
