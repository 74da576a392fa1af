"""The commands on every decoder: finetune, generate, merge and inspect, on the first switches of each row of cases."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import ARCHITECTURES, filled
from conftest import save_tokenizer
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax.cli.main import main
from peft_jax.models.registry import read_architecture

# Those with switches, and GPT-2, whose comparisons are in files of its own. What a model with images has of a text
# model is saved as that text model, which has a row of its own.
DECODERS = [
    name for name, row in ARCHITECTURES.items() if (row.switches or row.conv1d) and "text_config" not in row.sizes
]
SEVERAL_SHAPES = pytest.param("gemma4_text", marks=pytest.mark.slow)
ALWAYS = ["gemma", SEVERAL_SHAPES]  # layers of one shape, and of several
TOKENS = 288
FOR_TEXTS = {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(1, 5)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name`` is each row that is always tested; with ``--grid`` every row."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", DECODERS if metafunc.config.getoption("--grid") else ALWAYS)


def save_checkpoint(name: str, folder: Path) -> None:
    """Write a tiny model of a row with random weights, and a tokenizer."""
    row = ARCHITECTURES[name]
    kind, options = next(iter(row.switches.values()), (next(iter(row.model_types)), {}))
    fields: dict[str, Any] = {**row.sizes, **row.model_types[kind], **options, **FOR_TEXTS}
    fields |= {field: TOKENS for field in fields if field.startswith("vocab_size")}
    config = read_architecture({"model_type": kind, **fields})
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, bos=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A function that runs a command that must succeed in a folder of its own, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def words(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return words


def test_the_commands_run(name: str, run: Callable[..., Any]) -> None:
    save_checkpoint(name, Path("model"))
    Path("data.json").write_text(json.dumps(RECORDS))
    modules = ARCHITECTURES[name].modules
    targets = filled(["{first}", "{last}"], modules)
    finetune = ["finetune", "--model", "model", "--data", "data.json", "--output", "run", "--target-modules", *targets]
    run(*finetune, "--max-steps", "2", "--batch-size", "2", "--learning-rate", "0.1")
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses), steps
    adapter = load_file("run/adapter_model.safetensors")
    assert all(np.abs(tensor).max() > 0 for tensor in adapter.values()), "a matrix was not trained"

    asked = ["--max-new-tokens", "4", "--json", "Say the number."]
    (answer,) = [json.loads(line) for line in run("generate", "--adapter", "run", *asked).splitlines()]
    run("merge", "--adapter", "run", "--output", "merged")
    (merged,) = [json.loads(line) for line in run("generate", "--model", "merged", *asked).splitlines()]
    assert merged["text"] == answer["text"]
    before, after = (load_file(f"{folder}/model.safetensors") for folder in ("model", "merged"))
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert before.keys() == after.keys() and len(changed) == len(adapter) / 2

    fit = json.loads(run("inspect", "run", "--model", "model", "--json"))["fit"]
    assert fit["fits"] is True
