"""How the benchmarks time and weigh: contenders in turn in one run, ratios between them, memory in a process each."""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with PyTorch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
PAUSE = 0.02  # seconds between contenders, in which the threads of the last one go to sleep


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: What the table calls it.
        run: Does the work once, and returns when it is done.
        facts: What else is known of it, for its row of the record.
        before: Is called before each run, and is not timed.
    """

    name: str
    run: Callable[[], Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: Callable[[], Any] | None = None


class NotRun(Exception):
    """Why a contender cannot run here; the record says so in its row."""


def load_side(name: str) -> Any:
    """The module that does a contender's work: `theirs` if its name says PEFT or PyTorch, else `ours`.

    It is imported only now, as neither side is to be weighed with the other's libraries.
    """
    if "peft" in name or "torch" in name:
        import theirs as side
    else:
        import ours as side
    return side


def require_pytorch(instead: str) -> None:
    """Raise SystemExit if PyTorch or PEFT is missing; ``instead`` says how to do without."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{Path(sys.argv[0]).name} compares with PyTorch PEFT, but {' and '.join(missing)} cannot be imported. "
            f"Install them: pip install -e '.[benchmarks]'. {instead}"
        )


def interleave(
    contenders: Sequence[Contender], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender's runs by a clock, taken in turn; one more round before warms up and is left out.

    Python's garbage collector is off meanwhile, as in ``timeit``: its long runs would fall to one of them by chance.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(repeats + 1):
        for contender in contenders:
            gc.collect()
            time.sleep(PAUSE)
            if contender.before is not None:
                contender.before()
            with collector_off():
                start = clock()
                contender.run()
                seconds = clock() - start
            if turn:
                times[contender.name].append(seconds)
            said = f"turn {turn} of {repeats}" if turn else "warming up"
            print(f"{said}: {contender.name} {seconds:.3f} s", file=sys.stderr)
    return times


def take_memory(size: int) -> None:
    """Take memory of ``size`` bytes in huge pages where there are such, and give it back.

    A virtual machine returns free memory to its host after a second or two, and whoever takes it next waits for the
    host: 240 ms for 122 MiB were seen, of 14 ms otherwise. What is taken right after this call is there already.
    """
    np.empty(size, np.uint8).fill(1)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds that it takes."""
    start = time.perf_counter()
    found = run()
    return found, time.perf_counter() - start


def contend(
    names: Sequence[str],
    build: Callable[[str], Contender],
    repeats: int,
    tokens: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Build contenders by name, time them in turn, and return each one's row; ``tokens`` is what a run handles."""
    contenders, rows = [], {}
    for name in names:
        try:
            contenders.append(build(name))
        except NotRun as reason:
            rows[name] = {"name": name, "not_run": str(reason)}
    times = interleave(contenders, repeats, clock)
    for contender in contenders:
        rows[contender.name] = row(contender, times[contender.name], tokens)
    return {name: rows[name] for name in names}


def ratios(asked: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratios ``(what, above, below)`` of those rows that were timed."""

    def was_timed(name: str) -> bool:
        return "median" in rows.get(name, {})

    return [ratio(what, rows[a], rows[b]) for what, a, b in asked if was_timed(a) and was_timed(b)]


def memory_ratios(asked: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratios ``(field, above, below)`` of the bytes that were taken of both."""
    found = []
    for field, above, below in asked:
        sizes = rows.get(above, {}).get(field), rows.get(below, {}).get(field)
        if sizes[0] and sizes[1]:
            what = f"{field.removesuffix('_bytes').replace('_', ' ')} memory, {above} over {below}"
            found.append({"what": what, "above": above, "below": below, "median": sizes[0] / sizes[1]})
    return found


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise SystemExit if a contender is unknown."""
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no contender is named {', '.join(unknown)}. Take some of {', '.join(known)}.")


def row(contender: Contender, seconds: Sequence[float], tokens: int | None = None) -> dict[str, Any]:
    """A contender's row of a record, with tokens per second if the number of its tokens is known."""
    median = statistics.median(seconds)
    times = {"seconds": list(seconds), "median": median, "fastest": min(seconds), "slowest": max(seconds)}
    speed = {} if tokens is None else {"tokens_per_second": tokens / median}
    return {"name": contender.name, **times, **speed, **contender.facts}


def ratio(what: str, above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """How two rows' times compare: of medians, of the fastest runs, and of the runs of each turn, at both ends."""
    turns = [a / b for a, b in zip(above["seconds"], below["seconds"], strict=True)]
    return {
        "what": what,
        "above": above["name"],
        "below": below["name"],
        "median": above["median"] / below["median"],
        "fastest": above["fastest"] / below["fastest"],
        "lowest": min(turns),
        "highest": max(turns),
    }


def memory(build: Callable[[], Contender], side: Any) -> dict[str, int | None]:
    """What this process, which has imported ``side`` and done nothing else, takes to build and run a contender.

    Bytes beside what the imports and an idle device take: at the peak of a run once it has warmed up, and at the peak
    of all, with reading the checkpoint, tracing and compiling. None where the system does not report it.
    """
    side.wake()
    imported = status("VmRSS")
    contender = build()
    contender.run()
    contender.run()
    whole = status("VmHWM")
    give_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    contender.run()
    steady = status("VmHWM")
    if imported is None or whole is None or steady is None:
        return {"host_bytes": None, "host_peak_bytes": None, "device_peak_bytes": side.device_peak()}
    found = {"host_bytes": steady - imported, "host_peak_bytes": max(whole, steady) - imported}
    return {**found, "device_peak_bytes": side.device_peak()}


def give_back() -> None:
    """Return to the system what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's


def status(field: str) -> int | None:
    """A field of Linux's account of this process, in bytes; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def alone(name: str) -> dict[str, Any]:
    """What this program prints as its last line when it is started anew with ``--alone NAME``, read as JSON."""
    command = [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:], "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
