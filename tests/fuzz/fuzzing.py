"""Reads damaged folders, and reports each that ends otherwise than in a result or in a short error of the project's.

    python tests/fuzz/fuzzing.py KIND FOLDER FIRST COUNT

KIND is a key of `subjects.SUBJECTS`. Each number from FIRST on is a seed that makes one input. Each failure is a line
of JSON. A process that crashes has left the seed at hand in FOLDER/seed.
"""

import collections
import contextlib
import faulthandler
import json
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
from damage import damage  # noqa: E402
from subjects import SUBJECTS, check, one_of  # noqa: E402

LATEST = 10  # seconds of the processor for one input; others share the machine


class Late(BaseException):
    """An input that took too long."""


def on_alarm(number: int, frame: FrameType | None) -> None:
    """Raise Late where the program is."""
    raise Late


@contextlib.contextmanager
def watchdog() -> Any:
    """End a block that takes longer than `LATEST`: by an exception, and by the process's end where that is not seen."""
    before = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, LATEST)
    faulthandler.dump_traceback_later(6 * LATEST, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


class Fuzzer:
    """One kind of folder, below a folder of its own.

    Attributes:
        ends: How many inputs were accepted and refused.
        slowest: Seconds of the slowest input.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder, self.subject = kind, folder, SUBJECTS[kind]
        self.sound = self.subject.make(folder / "sound")
        self.ends: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        for one in self.sound:
            self.subject.read(one)

    def try_one(self, seed: int, compare: Any = None) -> dict[str, Any] | None:
        """Damage a folder by a seed and read it; the failure, if it is one."""
        dice = random.Random(seed)
        target = self.folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        origin = one_of(self.sound, dice)
        shutil.copytree(origin, target)
        what = damage(target, dice)
        begin, failure = time.monotonic(), None
        try:
            with watchdog(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.subject.read(target)
            self.ends["accepted"] += 1
            if compare is not None:
                compare(target, found)
        except Late as error:
            failure = "late\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
        except AssertionError as error:
            failure = _told(error.__cause__ or error, str(error))
        except BaseException as error:
            self.ends["refused"] += 1
            try:
                check(error)
            except AssertionError as wrong:
                failure = _told(error, str(wrong))
        self.slowest = max(self.slowest, time.monotonic() - begin)
        if failure is None:
            return None
        self.ends["failed"] += 1
        return {"kind": self.kind, "seed": seed, "of": origin.name, "damage": what, "failure": failure}


def _told(error: BaseException, message: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "peft_jax" in frame.filename or "interop" in frame.filename]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-3:]))
    return f"{message} @ {places}"


def run(kind: str, folder: Path, first: int, count: int) -> int:
    """Try some inputs, print failures and then a summary; the exit status is 1 if there is a failure."""
    fuzzer = Fuzzer(kind, folder)
    for seed in range(first, first + count):
        (folder / "seed").write_text(str(seed))
        failure = fuzzer.try_one(seed)
        if failure is not None:
            print(json.dumps(failure), flush=True)
    print(json.dumps({"kind": kind, "inputs": count, **fuzzer.ends, "slowest": round(fuzzer.slowest, 2)}), flush=True)
    return 1 if fuzzer.ends["failed"] else 0


def compile_quickly(folder: Path) -> None:
    """Programs run once each here."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    compile_quickly(Path(sys.argv[2]))
    sys.exit(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
