"""Runs of two processes of which one is killed: what the other one does, and whether both go on together.

    python tests/killed_pairs.py FOLDER [SEED ...]

FOLDER holds a model and data.json, and a process of each pair has one device. Runs go into FOLDER/whole-pair (not
killed), FOLDER/chosen-pair (killed and resumed at every moment of PAIR_MOMENTS in turn), FOLDER/early-pair (at those of
PAIR_EARLY, then started as their folder asks for), and FOLDER/random-pair-<SEED> (process SEED modulo 2 is killed at
some time). A list of what happened in each is printed as JSON.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killed_runs import (
    LORA,
    OPTIONS,
    after_rename,
    amid_files,
    before_marker,
    has_marker,
    in_best,
    in_evaluation,
    in_export,
    in_metrics,
    in_plot,
    in_save,
    kill,
    prepared,
    wait,
)

from peft_jax.cli.finetune import setup
from peft_jax.cli.main import main
from peft_jax.train.run_state import Checkpoints

Moment = Callable[[str], None]
LONGEST = 120  # seconds that the other process may take to end


def in_loading(output: str) -> None:
    """Before the base model is read."""
    setup.load_base = lambda *args: kill()  # type: ignore[assignment]


def in_restoring(output: str) -> None:
    """Before a checkpoint is read."""
    Checkpoints.restore = lambda self, like: kill()  # type: ignore[method-assign, assignment]


PAIR_EARLY: tuple[tuple[Moment, int], ...] = ((in_loading, 0), (in_loading, 1), (before_marker, 0))
PAIR_MOMENTS: tuple[tuple[Moment, int], ...] = (
    *((in_save, 0), (in_restoring, 1), (amid_files, 0), (after_rename, 0), (in_restoring, 0), (in_metrics, 0)),
    *((in_evaluation, 1), (in_evaluation, 0), (in_best, 0), (in_plot, 0), (in_export, 0)),
)


@dataclasses.dataclass
class Killed:
    """A pair of which one process was killed.

    Attributes:
        name: The moment, and the number of the process.
        killed: Exit code of that process.
        other: Exit code of the other one.
        seconds: What it took to end.
        line: What it said last.
        has_adapter: Whether the run's folder has an adapter then.
    """

    name: str
    killed: int
    other: int
    seconds: float
    line: str
    has_adapter: bool


def pair(output: str, words: tuple[str, ...], moment: Moment | None = None, victim: int = 0) -> list[int]:
    """Start two processes, one of which may be made to die; what each says goes to a file."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    children = []
    for number in (0, 1):
        child = os.fork()
        if child == 0:
            _be(output, number, (*words, "--coordinator-address", address), moment if number == victim else None)
        children.append(child)
    return children


def _be(output: str, number: int, words: tuple[str, ...], moment: Moment | None) -> None:
    """Be a process of a pair, and end as the installed command does."""
    said = os.open(_log(output, number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 1
    try:
        if moment is not None:
            moment(output)
        place = ("--mesh", "data=2", "--num-processes", "2", "--process-id", str(number))
        code = main([*OPTIONS, *LORA, "--output", output, *words, *place])
    finally:
        sys.exit(code)


def _log(output: str, number: int) -> str:
    return f"{output}-{number}.log"


def ended(children: list[int], output: str, name: str, victim: int) -> Killed:
    """Wait for a pair whose victim dies, and note how the other one ends."""
    killed = wait(children[victim])
    start = time.monotonic()
    other = children[1 - victim]
    while time.monotonic() < start + LONGEST:
        found, status = os.waitpid(other, os.WNOHANG)
        if found:
            seconds = time.monotonic() - start
            lines = Path(_log(output, 1 - victim)).read_text().strip().splitlines()
            code = os.waitstatus_to_exitcode(status)
            return Killed(f"{name} {victim}", killed, code, seconds, lines[-1], has_adapter(output))
        time.sleep(0.01)
    os.kill(other, signal.SIGKILL)
    wait(other)
    return Killed(f"{name} {victim}", killed, -signal.SIGKILL, LONGEST, "", has_adapter(output))


def has_adapter(output: str) -> bool:
    """Whether a run has written what it is for, which it does last."""
    return Path(output, "adapter_model.safetensors").exists()


def as_asked(output: str) -> tuple[str, ...]:
    """How to go on with a folder."""
    return ("--resume",) if has_marker(output) else ()


def in_turn(output: str, moments: tuple[tuple[Moment, int], ...]) -> list[Killed]:
    """Kill a run at each moment, and then let it end."""
    found = []
    for moment, victim in moments:
        children = pair(output, as_asked(output), moment, victim)
        found.append(ended(children, output, moment.__name__, victim))
        print(found[-1], file=sys.stderr, flush=True)
    found.append(whole(output, as_asked(output)))
    return found


def whole(output: str, words: tuple[str, ...] = ()) -> Killed:
    """Let both processes end."""
    children = pair(output, words)
    codes = [wait(child) for child in children]
    return Killed("the end", codes[0], codes[1], 0, "", has_adapter(output))


def at_random(seed: int, seconds: float) -> list[Killed]:
    """Kill one process at some time before the end, and let both go on."""
    output, dice, victim = f"random-pair-{seed}", random.Random(seed), seed % 2
    children = pair(output, ())
    time.sleep(dice.uniform(0, seconds))
    os.kill(children[victim], signal.SIGKILL)
    return [ended(children, output, "random", victim), whole(output, as_asked(output))]


def everything(seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """All pairs."""
    begin = time.monotonic()
    found = {"whole-pair": [whole("whole-pair")]}
    found["whole-pair"].append(whole("whole-pair-again"))
    seconds = (time.monotonic() - begin) / 2
    found["chosen-pair"] = in_turn("chosen-pair", PAIR_MOMENTS)
    found["early-pair"] = in_turn("early-pair", PAIR_EARLY)
    for seed in seeds:
        found[f"random-pair-{seed}"] = at_random(seed, seconds)
        print(found[f"random-pair-{seed}"], file=sys.stderr, flush=True)
    return {name: [dataclasses.asdict(one) for one in runs] for name, runs in found.items()}


if __name__ == "__main__":
    prepared(sys.argv[1])
    print(json.dumps(everything([int(seed) for seed in sys.argv[2:]])))
