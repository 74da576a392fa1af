"""Damaged folders: each ends in a result, or in one short error of the project's, within ten seconds.

`make test` reads 1,000 of them, `make fuzz` 20,000. A failure's seed makes its folder again.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Fuzzer
from subjects import SUBJECTS

# The inputs of each kind that `make test` has time for: some 20 seconds of the processor in all.
QUICK = {"adapter": 40, "base": 15, "data": 245, "run": 700}


def oracle_of(kind: str) -> Any:
    """PEFT, for adapters and where it is installed."""
    if kind != "adapter" or importlib.util.find_spec("peft") is None:
        return None
    from oracle import Oracle

    return Oracle()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SUBJECTS)
def test_damaged_folders_end_in_a_result_or_a_short_error(
    kind: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("--fuzz") or QUICK[kind]
    fuzzer = Fuzzer(kind, tmp_path)
    oracle = oracle_of(kind)
    failures = [failure for seed in range(count) if (failure := fuzzer.try_one(seed, oracle))]
    print(f"{kind}: {count} inputs, {dict(fuzzer.ends)}, the slowest {fuzzer.slowest:.2f} s")
    for failure in failures:
        print(json.dumps(failure))
    assert not failures
    if oracle is not None:
        assert oracle.alive * 2 > oracle.compared > 0
    assert fuzzer.ends["refused"] > fuzzer.ends["accepted"] > 0
