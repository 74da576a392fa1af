"""How closely outputs agree with PyTorch PEFT's: the comparison, and the table that the tests which compare leave.

`make conformance` writes the table to docs/conformance.md. A test belongs in it if its file has a function
``described(**parameters)`` that gives the config class, the model and the option of a test by its parameters.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import peft_jax as pj

TOLERANCE = 1e-5  # of the largest output, if that is above 1; all is float32
HEAD = """# Conformance

The largest difference between our outputs and those of PyTorch PEFT 0.21.2, over the adapters that tests move
between the two: its file made there and read here, saved again, merged; and made here and read there. It is relative to
the largest output, or to 1 if that is smaller. All is float32. The tests allow 1e-5, and in each of them the adapter
moves the outputs by at least 100 times that. Written by `make conformance` from six test files;
`tests/test_decoders.py` compares the other architectures in the same way, and is not in this table.

| method | model | option | largest difference |
|---|---|---|---|
"""
seen: list[float] = []  # differences in the test that runs
table: dict[tuple[str, str, str], float] = {}

Row = tuple[str, str, str, float]


def tolerance(want: Any) -> float:
    """How far outputs may be from these."""
    return TOLERANCE * max(1, np.abs(want).max())


def close(got: Any, want: Any) -> None:
    """Assert that outputs agree, and note how closely."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    seen.append(float(np.abs(got - want).max() / max(1, np.abs(want).max())))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(want))


def plain(value: Any) -> Any:
    """A field of a config, sets and absent fields made comparable."""
    return sorted(value) if isinstance(value, list) else value


def only_task(theirs: Any, rows: int) -> dict[str, Any]:
    """What calls of PEFT's models need beside other inputs: a POLY asks for each row's task, though there is one."""
    import torch

    has_tasks = any(config.peft_type == "POLY" for config in theirs.peft_config.values())
    return {"task_ids": torch.zeros(rows, dtype=torch.long)} if has_tasks else {}


def same_files(ours: Path, theirs: Path) -> dict[str, np.ndarray]:
    """Assert that two folders hold the same adapter, in every field, key and byte; its tensors."""
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)]
    for field in configs[0].keys() | configs[1].keys():
        assert plain(configs[0].get(field)) == plain(configs[1].get(field)), field
    got, want = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and got[key].tobytes() == want[key].tobytes(), key
    return want


def row_of(item: Any) -> Row | None:
    """The row of a test that has run, if it belongs in the table."""
    describe = getattr(item.module, "described", None)
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if not seen or describe is None or "row" not in params:
        return None
    return (*named(describe(**params)), max(seen))


def named(described: tuple[str, str, str]) -> tuple[str, str, str]:
    """PEFT's name of the method instead of its config class."""
    config, model, option = described
    return getattr(pj, config).peft_type, model, option


def note(row: Row) -> None:
    """Enter a row; of several tests of it the worst counts."""
    *key, difference = row
    table[tuple(key)] = max(difference, table.get(tuple(key), 0))  # type: ignore[index]


def write(file: Path) -> None:
    """Write the table."""
    rows = (f"| {' | '.join(key)} | {difference:.0e} |" for key, difference in sorted(table.items()))
    file.parent.mkdir(exist_ok=True)
    file.write_text(HEAD + "\n".join(rows) + "\n")
