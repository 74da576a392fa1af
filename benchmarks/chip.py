"""Measure LoRA training and decoding on this machine's GPU or TPU, beside PyTorch PEFT where PyTorch sees the chip.

    make bench-chip                     # or python3 benchmarks/chip.py: at most 6 minutes, and nothing to install
    python3 benchmarks/chip.py --missing     # again: what did not fit
    python3 benchmarks/chip.py --minutes 4 --parts "train 1b" "decode 1b"
    python3 benchmarks/chip.py --tiny   # a rehearsal, on a CPU too, into build/chips

Needs jax, flax, optax, orbax-checkpoint, transformers and safetensors, and for the comparison torch and peft; peft_jax
itself need not be installed. Contenders are built one after the other and then timed in turn, JAX's and PyTorch's in a
process each. The chip's record (docs/chips/) and docs/chips.md are written after every figure, so that a run that is
ended loses nothing. A later run replaces what it measures anew. What does not fit in the time is reported there.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chip_plan import PARTS, SIDES, TINY, Part, side_of
from chip_process import OVER, Clock, Failed, Worker
from chip_record import Record

ROOT = Path(__file__).resolve().parent.parent
TURNS = 5
BUILD, RUN = 120.0, 60.0  # seconds that building a contender, and a run of it, may take
REHEARSED = 600.0  # the same in a rehearsal, as a CPU compiles PyTorch's step for minutes
TIMING = 40.0  # seconds after which a stage takes no further turn
CLOSING = 5.0  # seconds for ending what was begun
Start = Callable[[Part, str], Worker]
Workers = dict[str, Worker]


def start_process(part: Part, side: str) -> Worker:
    """A process of a side of a part."""
    program = Path(__file__).with_name("chip_worker.py")
    return Worker([sys.executable, str(program), side, json.dumps(part.settings)])


def start_sides(part: Part, start: Start) -> Workers:
    """The processes that a part needs; they import their libraries at the same time."""
    needed = set(map(side_of, part.contenders))
    return {side: start(part, side) for side in SIDES if side in needed}


def measure(part: Part, workers: Workers, record: Record, clock: Clock, most: float) -> None:
    """Build and time the contenders of a part, stage by stage, and end its processes.

    Args:
        part: What is measured.
        workers: Its processes; none if the time is over, which is noted.
        record: Where figures go.
        clock: The time left of the run.
        most: Seconds that building a contender may take.
    """
    if not workers:
        for name in part.contenders:
            record.note(part, name, OVER)
        say(f"{part.name}: not begun: {OVER}")
        return
    ready: list[str] = []
    try:
        for number, stage in enumerate(part.stages):
            built = [name for name in stage if build(part, name, workers[side_of(name)], record, clock, most)]
            ready += built
            if built:
                take_turns(part, ready, workers, record, clock, range(number * TURNS, (number + 1) * TURNS))
    finally:
        for worker in workers.values():
            worker.stop("its part is over")


def build(part: Part, name: str, worker: Worker, record: Record, clock: Clock, most: float) -> bool:
    """Make a contender ready; return whether it is, and note why it is not."""
    begun = time.monotonic()
    try:
        hello = worker.greet(clock)
        if hello["device"] == "cpu" and record.chip != "cpu":
            raise Failed("PyTorch sees no CUDA device")
        facts = worker.ask({"build": name}, clock, most)["facts"]
    except Failed as reason:
        say(f"{part.name}: {name} not run: {reason}")
        record.note(part, name, str(reason))
        return False
    built = time.monotonic() - begun
    say(f"{part.name}: {name} ready after {built:.1f} s")
    record.ready(part, name, {"facts": facts, "built_seconds": built, "versions": hello["versions"]})
    return True


def take_turns(
    part: Part, names: Sequence[str], workers: Workers, record: Record, clock: Clock, turns: Sequence[int]
) -> None:
    """Time contenders in turn; one that fails takes no further part, and the figures that it has stay."""
    waiting, begun = list(names), time.monotonic()
    for turn in turns:
        if turn > turns[0] and time.monotonic() - begun > TIMING:
            break
        for name in tuple(waiting):
            try:
                seconds = workers[side_of(name)].ask({"run": name}, clock, RUN)["seconds"]
            except Failed as reason:
                say(f"{part.name}: {name} stopped: {reason}")
                record.note(part, name, str(reason))
                waiting.remove(name)
                continue
            record.add(part, name, turn, seconds)
            say(f"{part.name}: {name} {1000 * seconds:.2f} ms")


def say(text: str) -> None:
    """Report on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def run(
    parts: Sequence[Part],
    minutes: float,
    docs: Path,
    *,
    missing: bool = False,
    rehearsal: bool = False,
    start: Start = start_process,
) -> Record:
    """Measure parts in order, and return the chip's record.

    Args:
        parts: The first one is measured by JAX alone; it finds out the chip's name.
        minutes: When to end.
        docs: Folder of chips.md.
        missing: Whether to leave out the other parts of which every contender has a figure.
        rehearsal: Whether a CPU will do.
        start: Starts a process.

    Raises:
        SystemExit: If JAX cannot be imported, or finds no accelerator.
    """
    clock = Clock(60 * minutes - CLOSING)
    workers = start_sides(parts[0], start)
    try:
        chip = str(workers["jax"].greet(clock)["device"])
        if chip == "cpu" and not rehearsal:
            raise Failed("JAX finds no GPU or TPU here. Run make bench for a CPU's figures, or rehearse: --tiny")
    except Failed as reason:
        workers["jax"].stop("there is no chip")
        raise SystemExit(f"chip.py measures nothing: {reason}") from None
    record = Record(docs, chip)
    most = REHEARSED if rehearsal else BUILD
    measure(parts[0], workers, record, clock, most)
    for part in parts[1:]:
        if not (missing and record.is_whole(part)):
            measure(part, start_sides(part, start) if clock.left() else {}, record, clock, most)
    return record


def chosen(arguments: argparse.Namespace) -> list[Part]:
    """The parts to measure, the matrices' products first: they name the chip and its peak.

    Raises:
        SystemExit: If there is no part of a name.
    """
    plan = TINY if arguments.tiny else PARTS
    names = [part.name for part in plan]
    if unknown := [name for name in arguments.parts or () if name not in names]:
        raise SystemExit(f"no part is named {', '.join(unknown)}. Take some of {', '.join(names)}.")
    return [part for part in plan if part is plan[0] or not arguments.parts or part.name in arguments.parts]


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure, and say where the figures are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])  # tyro may not be there
    parser.add_argument("--minutes", type=float, default=6.0, help="when to end (default: 6)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="what to measure (default: all, while time is left)")
    parser.add_argument("--missing", action="store_true", help="leave out parts that have all their figures already")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny shapes")
    parser.add_argument(
        "--docs", type=Path, help="folder of chips.md and chips/ (default: docs, or build/chips if tiny)"
    )
    arguments = parser.parse_args(words)
    docs = arguments.docs or ROOT / ("build/chips" if arguments.tiny else "docs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; what was measured is kept"))
    options = {"missing": arguments.missing, "rehearsal": arguments.tiny}
    parts = chosen(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = scratch  # of the processes, which may be ended while they compile
        record = run(parts, arguments.minutes, docs, **options)
    print(f"Wrote {record.file} and {docs / 'chips.md'}.")
    if arguments.tiny and (faults := record.faults()):
        raise SystemExit("the rehearsal failed: " + "; ".join(faults))


if __name__ == "__main__":
    main()
