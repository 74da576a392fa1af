"""Trains on meshes of 8 virtual devices and on one device, and carries checkpoints from one to the other.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/mesh_runs.py FOLDER MESH ...

FOLDER holds a model and data.json, a MESH is like data=8. Each mesh has a few steps with a float base, the last one
with an nf4 and an int8 base too, and 20 steps with the int8 base. Printed as JSON: of each run the losses, and how its
arrays lay.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply
from peft_jax.core.paths import dotted
from peft_jax.prompts.tokenizer import read_tokenizer
from peft_jax.train import (
    Padded,
    State,
    evaluate,
    evaluation_batches,
    make_evaluation_step,
    make_optimizer,
    make_training_step,
    read_data,
    start,
    train,
    training_batches,
)
from peft_jax.train.data.encode import encode
from peft_jax.train.mesh import (
    PlacedBatches,
    make_mesh,
    parse_mesh,
    place,
    place_batch,
    place_state,
    shardings,
)
from peft_jax.train.run_state import Checkpoints

STEPS, HALF, FEW = 20, 10, 3


def trainer(mesh: Any, **load: bool) -> Callable[..., dict[str, Any]]:
    """A function that trains on a mesh (None for one device): from a checkpoint's folder, or from the start."""
    model = pj.AutoModelForCausalLM.from_pretrained("model", **load)
    config = pj.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    model = pj.get_peft_model(model, config, key=jax.random.key(1))
    data = Padded(encode(read_data("data.json"), read_tokenizer("model"), cutoff_len=64).examples)
    batches, optimizer = training_batches(data, 16, seed=0), make_optimizer(0.01, STEPS)
    layout = None
    if mesh is None:
        first, frozen = start(model, optimizer, seed=0)
    else:
        batches = PlacedBatches(batches, mesh)
        first, frozen = start(place(model, mesh), optimizer, seed=0)
        first = place_state(first, mesh)
        layout = (*shardings((first.trainable, first.opt_state)), None)
    step = make_training_step(apply, optimizer, micro_batch_size=8, out_shardings=layout)
    evaluation = make_evaluation_step(apply)

    def run(*, steps: int = STEPS, save: str = "", load: str = "") -> dict[str, Any]:
        state, losses = State(0, *jax.tree.map(jnp.copy, tuple(first[1:]))), []
        if load:
            state, notes = Checkpoints(Path(load), keep=1).restore(first)
            losses = notes["losses"]
        before = parts((state.trainable, state.opt_state, frozen))
        for state, metrics in train(step, state, frozen, batches, max_steps=steps):  # noqa: B020
            losses.append(float(metrics.loss))
            if save and state.step == HALF:
                Checkpoints(Path(save), keep=1).save(state, {"losses": losses})
        held_out = evaluation_batches(data, 8)
        placed = held_out if mesh is None else (place_batch(batch, mesh) for batch in held_out)
        if steps == STEPS:
            losses.append(evaluate(evaluation, pj.combine(state.trainable, frozen), placed))
        kept = before == parts((state.trainable, state.opt_state, frozen))
        return {"losses": losses, "parts": before, "kept": kept, "compiled": step._cache_size()}

    return run


def parts(tree: Any) -> dict[str, int]:
    """In how many parts each array lies."""
    leaves = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    shapes = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves.items()}
    return {path: leaf.size // max(1, jnp.zeros(shapes[path]).size) for path, leaf in leaves.items()}


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    meshes: dict[str, Any] = {"one": None, **{text: make_mesh(parse_mesh(text)) for text in sys.argv[2:]}}
    last, found = sys.argv[-1], {}
    for kind, load in {"float": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}.items():
        names = meshes if kind == "float" else ("one", last)
        run = {text: trainer(meshes[text], **load) for text in names}
        found |= {f"{kind} {text}": run[text](steps=FEW) for text in names}
    found |= {text: run[text](save=f"from-{text}") for text in ("one", last)}
    found["many to one"] = run["one"](load=f"from-{last}")
    found["one to many"] = run[last](load="from-one")
    print(json.dumps(found))
