"""Reads damaged folders, and reports each that ends otherwise than in a result or in a short error of the project's.

    python tests/fuzz/fuzzing.py KIND FOLDER FIRST COUNT [compare]

KIND is a key of `subjects.SUBJECTS`. With `compare`, adapters that are accepted have to compute what PEFT computes.
 Each number from FIRST on is a seed that makes one input. Each failure is a line
of JSON. A process that crashes has left the seed at hand in FOLDER/seed.
"""

import collections
import json
import random
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
from damage import damage  # noqa: E402
from subjects import SUBJECTS, check, one_of  # noqa: E402
from watchdog import Late, watchdog  # noqa: E402


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
            self.slowest = max(self.slowest, time.monotonic() - begin)
            if compare is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    compare(target, found)
        except Late as error:
            failure = "late\n" + "".join(traceback.format_tb(error.__traceback__)[-3:])
        except AssertionError as error:
            failure = _told(error.__cause__ or error, str(error))
        except BaseException as error:
            self.ends["refused"] += 1
            self.slowest = max(self.slowest, time.monotonic() - begin)
            try:
                check(error)
            except AssertionError as wrong:
                failure = _told(error, str(wrong))
        if failure is None:
            return None
        self.ends["failed"] += 1
        return {"kind": self.kind, "seed": seed, "of": origin.name, "damage": what, "failure": failure}


def _told(error: BaseException, message: str) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "peft_jax" in frame.filename or "interop" in frame.filename]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-3:]))
    return f"{message} @ {places}"


def run(kind: str, folder: Path, first: int, count: int, *, compared: bool = False) -> int:
    """Try some inputs, print failures and then a summary; the exit status is 1 if there is a failure."""
    fuzzer, oracle = Fuzzer(kind, folder), None
    if compared:
        from oracle import Oracle  # which imports torch

        oracle = Oracle()
    for seed in range(first, first + count):
        (folder / "seed").write_text(str(seed))
        failure = fuzzer.try_one(seed, oracle)
        if failure is not None:
            print(json.dumps(failure), flush=True)
    told: dict[str, Any] = {"kind": kind, "inputs": count, **fuzzer.ends, "slowest": round(fuzzer.slowest, 2)}
    if oracle is not None:
        told |= {"compared with PEFT": oracle.compared, "alive": oracle.alive, "refused by PEFT alone": oracle.refused}
    print(json.dumps(told), flush=True)
    return 1 if fuzzer.ends["failed"] else 0


def compile_quickly(folder: Path) -> None:
    """Programs run once each here."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    compile_quickly(Path(sys.argv[2]))
    sys.exit(
        run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), compared="compare" in sys.argv[5:])
    )
