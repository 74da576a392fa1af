"""CONTRIBUTING.md's templates, followed: a method and an architecture are added to a copy, and its tests run there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(r"^```python\n# (?P<file>[\w/.]+)(?:, in (?P<table>[A-Z]+))?\n(?P<text>.*?)^```", re.M | re.S)

TRAINED_AND_SAVED = """
import jax
import numpy as np
import optax

import peft_jax as pj
from peft_jax import train as pt
from peft_jax.models.registry import read_architecture

IDS = np.array([[5, 9, 2, 7, 11, 3]])
MASK = np.ones_like(IDS)


def logits(model, input_ids, attention_mask):
    return model(input_ids, attention_mask=attention_mask).logits


def test_the_templates_together(tmp_path):
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "initializer_range": 0.5}
    config = read_architecture({"model_type": "arcee", **sizes, **more})
    base = pj.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))
    model = pj.get_peft_model(base, pj.GainConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    tx = optax.adam(0.1)
    step = pt.make_training_step(logits, tx)
    trainable, frozen = pj.partition(model)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    state, losses = tx.init(trainable), []
    for number in range(8):
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(number))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.01
    model = pj.combine(trainable, frozen)
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    again = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = pj.PeftModel.from_pretrained(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert not np.allclose(base(IDS).logits, model(IDS).logits, atol=1e-3)
"""


def follow(folder: Path) -> list[str]:
    """Adds to a copy of the repository what the templates say, where they say it; returns the files that they name."""
    followed = []
    for block in BLOCK.finditer(GUIDE):
        name, table, text = block["file"], block["table"], block["text"]
        file = folder / name.replace("interop/", "peft_jax/interop/")
        old = file.read_text() if file.exists() else ""
        if table:
            head = re.search(rf"^{table}: .* = [{{(]\n", old, re.M)
            assert head is not None, f"{name} has no table {table}"
            text = old[: head.end()] + text + old[head.end() :]
        elif old:
            docstring = re.match(r'""".*?"""\n\n', old, re.S)
            assert docstring is not None
            text = docstring[0] + text + old[docstring.end() :]
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        followed.append(name)
    (folder / "peft_jax" / "models" / "arcee" / "__init__.py").write_text('"""The Arcee family."""\n')
    return followed


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests with both templates."""
    folder = tmp_path / "followed"
    no_programs = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "peft_jax", folder / "peft_jax", ignore=no_programs)
    shutil.copytree(ROOT / "interop", folder / "peft_jax" / "interop", ignore=no_programs)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=no_programs)
    shutil.copy(ROOT / "pyproject.toml", folder)
    followed = follow(folder)
    assert len(followed) == len(set(followed)) + 2, "the registry and cases.py are each named twice"
    (folder / "tests" / "test_the_templates.py").write_text(TRAINED_AND_SAVED)
    return folder


# The tests that run in the copy.
CHECKS = {
    "torch-free": (
        "tests/test_the_templates.py",
        "tests/test_cases.py::test_every_registered_method_has_one_row",
        "tests/test_cases.py::test_every_architecture_has_one_row_and_the_row_its_model_types",
        "tests/test_methods.py::test_a_fresh_adapter_changes_nothing[GAIN]",
        "tests/test_methods.py::test_products_and_lookups_equal_merging_first[GAIN]",
        "tests/test_methods.py::test_stacked_equals_looped[GAIN]",
        "tests/test_adapter_files.py::test_whatever_is_missing_left_over_or_of_another_shape_is_listed[GAIN]",
    ),
    "beside PyTorch": ("tests/test_decoders.py::test_logits_and_loss_at_all_positions[arcee]",),
}


@pytest.mark.parametrize("check", ["torch-free", pytest.param("beside PyTorch", marks=pytest.mark.slow)])
def test_the_templates_work_as_they_stand(check: str, copy: Path) -> None:
    """In a process of its own, as a method and an architecture that are registered stay so."""
    if check == "beside PyTorch":
        pytest.importorskip("torch")
        pytest.importorskip("peft")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *CHECKS[check]]
    found = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert "s" not in found.stdout.splitlines()[0].partition(" ")[0], "a check of the templates was skipped"
