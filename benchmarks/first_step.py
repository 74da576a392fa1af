"""The time of `peft-jax finetune` from its imports to its first step, with and without programs that are kept.

    python benchmarks/first_step.py --layers 6

A toy with few features is trained for one step in fresh processes, so that its products take next to nothing. All that
the command imports on the way is imported before the clock starts; the checkpoint is too small for reading to count.
Where PyTorch is installed, transformers imports it too, before the clock starts.

Of a later start, whose programs are kept, the processor's time is given. A first start compiles in a thread, and is
compared by the clock with what that thread takes. On many records it also has to tokenize for seconds. With cores to
spare it does both at once, for the programs that a sample of the data needs; it is compared with the longer of what the
thread takes in a start that does one after the other, and of a start that tokenizes alone, as its programs are kept.
"""

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import tyro

OWN = "its own process"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
RUN = "finetune --model model --output out{} --max-steps 1 --batch-size 8 --data {}.json --compilation-cache {}"
FEW, MANY = "few", "many"
GUESSED, ALONE = "guessed", "alone"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work.

    Attributes:
        layers: Of the model.
        starts: Later starts on few records; as many as turns at least.
        records: Many records.
        turns: First starts of each kind.
    """

    layers: int = 6
    starts: int = 5
    records: int = 30000
    turns: int = 3


class Start(NamedTuple):
    """Seconds from the imports to the first step.

    Attributes:
        processor: Of the processor, of all threads.
        clock: By the clock.
        compiling: Those by the clock that the thread takes which lowers and compiles.
    """

    processor: float
    clock: float
    compiling: float


def write_work(layers: int, records: int) -> None:
    """Write a checkpoint, and few and many records of the same lengths, to the current folder."""
    from ours import random_model

    from peft_jax.cli.demo_data import MODEL

    fields = json.loads((MODEL / "config.json").read_text())
    shape = {name: fields[name] for name in SIZES}
    ends = {"eos_token_id": fields["eos_token_id"]}  # as a checkpoint on the hub, which has its tokenizer's
    random_model({**shape, **ends, "num_hidden_layers": layers}, "float32").save_pretrained(Path("model"))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, "model")
    numbers = random.Random(0)
    texts = []
    for _ in range(records):
        answer = " ".join(map(str, range(numbers.randint(2, 34))))
        texts.append({"prompt": "Count:", "completion": answer})
    Path(f"{MANY}.json").write_text(json.dumps(texts))
    Path(f"{FEW}.json").write_text(json.dumps(texts[:512]))


def first_step(guess: str, words: list[str]) -> Start:
    """Train in this process up to the first step, with a guess from a sample of the data or without."""
    import grain  # noqa: F401
    import jax
    import transformers.models.llama.configuration_llama  # noqa: F401

    import peft_jax.cli.finetune.finetune  # noqa: F401
    import peft_jax.models.handles.auto  # noqa: F401
    from peft_jax.cli.finetune import ahead
    from peft_jax.cli.finetune import guess as guessing
    from peft_jax.cli.main import main
    from peft_jax.train.metrics import MetricsLog

    write, compile_in_a_thread = MetricsLog.write, ahead._compile
    ends: list[tuple[float, float]] = []
    compiling: list[float] = []

    def noted(self: MetricsLog, row: dict[str, float | int]) -> None:
        ends.append((time.process_time(), time.perf_counter()))
        write(self, row)

    def timed(*args: Any) -> None:
        since = time.perf_counter()
        compile_in_a_thread(*args)
        compiling.append(time.perf_counter() - since)

    MetricsLog.write = noted  # type: ignore[method-assign]
    ahead._compile = timed
    guessing.CORES = 1 if guess == GUESSED else sys.maxsize
    jax.devices()
    processor, clock = time.process_time(), time.perf_counter()
    if main(words) != 0:
        raise SystemExit("the run failed")
    return Start(ends[0][0] - processor, ends[0][1] - clock, sum(compiling))


def main(settings: Settings) -> None:
    """Print the seconds of each start."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(__file__).resolve())
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

        def run(*words: str) -> str:
            command = [sys.executable, program, OWN, *words]
            return subprocess.run(
                command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout

        def start(guess: str, data: str, cache: str) -> Start:
            number = len(list(Path(folder).glob("out*")))
            last = run(guess, *RUN.format(number, data, cache).split()).splitlines()[-1]
            return Start(*json.loads(last))

        run("write", str(settings.layers), str(settings.records))
        first: dict[str, list[Start]] = {GUESSED: [], ALONE: [], FEW: []}
        later: dict[str, list[Start]] = {GUESSED: [], ALONE: [], FEW: []}
        for turn in range(settings.turns):
            for kind in first:
                guess, data = (ALONE, FEW) if kind == FEW else (kind, MANY)
                first[kind].append(start(guess, data, f"{kind}{turn}"))
                later[kind].append(start(guess, data, f"{kind}{turn}"))
        later[FEW] += [start(ALONE, FEW, f"{FEW}0") for _ in range(settings.starts - settings.turns)]
    print(f"later starts on few records: {_seconds([one.processor for one in later[FEW]])} of the processor")
    for kind, starts in first.items():
        records = "few records" if kind == FEW else f"{settings.records} records, {kind}"
        print(f"a first start on {records}: {_seconds([one.clock for one in starts])} by the clock")
        print(f"the thread that compiles takes of it: {_seconds([one.compiling for one in starts])}")
        print(f"a later start: {_seconds([one.clock for one in later[kind]])}")
    ratios = [one.clock / one.compiling for one in first[FEW]]
    print(f"on few records, a first start over its compiling: {statistics.median(ratios):.2f}")
    longer = max(
        statistics.median(one.compiling for one in first[ALONE]), statistics.median(one.clock for one in later[ALONE])
    )
    guessed = statistics.median(one.clock for one in first[GUESSED])
    print(f"on {settings.records}, over the longer of compiling and tokenizing: {guessed / longer:.2f}")


def _seconds(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} s, {min(found):.2f} to {max(found):.2f}"


if __name__ == "__main__":
    if sys.argv[1:2] == [OWN]:
        _, _, kind, *words = sys.argv
        if kind == "write":
            write_work(*map(int, words))
        else:
            print(json.dumps(first_step(kind, words)))
    else:
        main(tyro.cli(Settings))
