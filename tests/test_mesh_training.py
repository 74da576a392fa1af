"""Training on a mesh: the losses of one device, arrays in parts, checkpoints that move."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import quick_compilation
from jax.sharding import PartitionSpec as P

import peft_jax as pj
from peft_jax import train
from peft_jax.cli.shared.forward_pass import apply
from peft_jax.models import LlamaConfig
from peft_jax.train.mesh import (
    AXES,
    RULES,
    PlacedBatches,
    make_mesh,
    parse_mesh,
    place,
    place_state,
    shardings,
    spec,
)

MESH = "data=2,fsdp=2,tensor=2"
ALONG_ONE_AXIS = ("data=8", "fsdp=8", "tensor=8")


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What runs on one device and on eight tell."""
    folder = tmp_path_factory.mktemp("mesh")
    shutil.copytree(tiny_llama, folder / "model")
    records = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(24)]
    (folder / "data.json").write_text(json.dumps(records))
    words = [sys.executable, Path(__file__).with_name("mesh_runs.py"), folder, *ALONG_ONE_AXIS, MESH]
    run = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **quick_compilation.environment(devices=8)}
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_eight_devices_give_the_losses_of_one(runs: dict[str, Any]) -> None:
    wanted = runs["one"]["losses"]
    assert len(wanted) == 21 and wanted[0] - wanted[-1] > 0.1
    for name in (MESH, "many to one", "one to many"):
        np.testing.assert_allclose(runs[name]["losses"], wanted, rtol=1e-5)


# 64 does not divide nf4's 32 inputs: blocks run on through the outputs, and fsdp, which splits inputs, has none.
@pytest.mark.parametrize(
    ("base", "array", "parts"),
    [
        ("float", "q_proj.kernel.base", {"data=8": 1, "fsdp=8": 8, "tensor=8": 8, MESH: 4}),
        ("int8", "q_proj.kernel.base.q", {MESH: 4}),
        ("nf4", "q_proj.kernel.base.packed", {MESH: 2}),
    ],
)
def test_each_base_has_the_losses_of_one_device_on_a_mesh(
    runs: dict[str, Any], base: str, array: str, parts: dict[str, int]
) -> None:
    wanted = runs[f"{base} one"]["losses"]
    assert len(wanted) == 3 and len(set(wanted)) == 3
    assert runs["float one"]["losses"] != runs["int8 one"]["losses"] != runs["nf4 one"]["losses"]
    for mesh, count in parts.items():
        found = runs[f"{base} {mesh}"]
        np.testing.assert_allclose(found["losses"], wanted, rtol=1e-5)
        assert [parts for path, parts in found["parts"].items() if path.endswith(array)] == [count], mesh


def test_arrays_lie_in_parts_and_stay_so(runs: dict[str, Any]) -> None:
    assert all(run["kept"] for run in runs.values())
    assert all(run["compiled"] == 1 for name, run in runs.items() if " to " not in name)
    assert set(runs["one"]["parts"].values()) == {1}
    parts = runs[MESH]["parts"]
    assert parts == runs["one to many"]["parts"] and runs["one"]["parts"] == runs["many to one"]["parts"]
    for path, count in parts.items():
        tail = path.rsplit(".", 1)[-1]
        wanted: int | None = {"q": 4, "kernel": 4, "embedding": 4, "lora_A": 2, "lora_B": 2}.get(tail)
        if wanted is None:
            wanted = 2 if path.endswith(("kernel.scale", "kernel.base.scale")) else 1
        assert count == wanted, path
    assert sum(".mu." in path or ".nu." in path for path in parts) == 8


def test_rules_are_taken_by_the_end_of_the_path() -> None:
    mesh = make_mesh({})
    for path, wanted in {
        "model.layers.mlp.down_proj.kernel": P(None, "tensor", ("fsdp", "expert")),
        "model.layers.input_layernorm.scale": P(),
    }.items():
        assert spec(path, (2, 8, 8), mesh) == wanted
    assert spec("model.embed_tokens.embedding", (8, 8), mesh) == P(("tensor", "fsdp", "expert"), None)
    assert spec("encoder.block.layer_0.SelfAttention.o.kernel", (8, 8), mesh) == P("tensor", ("fsdp", "expert"))
    named = [(axis,) if isinstance(axis, str) else axis or () for _, rule in RULES for axis in rule]
    assert {name for names in named for name in names} < set(AXES)


@pytest.mark.parametrize("text", ["data", "data=x", "model=2", "data=2;fsdp=2", ""])
def test_sizes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="Give sizes of data, fsdp, tensor, expert, such as data=4,fsdp=2"):
        parse_mesh(text)


def test_sizes_that_do_not_fit_the_devices() -> None:
    with pytest.raises(ValueError, match="the mesh data=3,tensor=5 needs 15 devices, but there are 8"):
        make_mesh({"data": 3, "tensor": 5})
    with pytest.raises(ValueError, match="has no axis rows"):
        make_mesh({"rows": 1})


def test_adalora_on_eight_devices_is_that_of_one() -> None:
    """All its arrays, its choices of ranks and its penalty, step by step."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    schedule = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 3, "deltaT": 2, "lora_alpha": 16}
    adapter = pj.AdaLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **schedule)
    ids = np.random.default_rng(0).integers(0, 64, (10, 16, 6)).astype(np.int32)
    batches: Any = [{"input_ids": one, "attention_mask": np.ones_like(one), "labels": one} for one in ids]
    # Adam's first step is g / (|g| + eps): with its eps of 1e-8 an element whose gradient is rounding alone would move
    # by up to the learning rate, another way on other devices, as their sums are in another order.
    optimizer = optax.adamw(0.02, eps=1e-5)

    def run(mesh: Any) -> tuple[Any, list[Any], list[float]]:
        model = pj.get_peft_model(pj.AutoModelForCausalLM.from_config(config), adapter, key=jax.random.key(1))
        state, frozen = train.start(model if mesh is None else place(model, mesh), optimizer, seed=0)
        layout, placed = None, batches
        if mesh is not None:
            placed = PlacedBatches(batches, mesh)
            state = place_state(state, mesh)
            layout = (*shardings((state.trainable, state.opt_state)), None)
        step = train.make_training_step(apply, optimizer, out_shardings=layout)
        arrays, losses = [], []
        for state, metrics in train.train(step, state, frozen, placed, max_steps=10):  # noqa: B020
            arrays.append(jax.device_get(state.trainable))
            losses.append(float(metrics.loss))
        model = train.finished(state.trainable, frozen, state.opt_state)
        return model.peft_config["default"].rank_pattern, arrays, losses

    pattern, arrays, losses = run(None)
    assert pattern and not all(map(all, pattern.values()))
    other, found, told = run(make_mesh(parse_mesh(MESH)))
    assert other == pattern
    np.testing.assert_allclose(told, losses, rtol=1e-5)
    for one, two in zip(arrays, found, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-5), one, two)
