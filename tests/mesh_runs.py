"""Trains on meshes of 8 virtual devices and on one device, and carries checkpoints from one to the other.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/mesh_runs.py FOLDER MESH ...

FOLDER holds a model and data.json, a MESH is like data=8. Printed as JSON: of each run of 20 steps the losses, and how
its arrays lay.
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
from peft_jax.cli.checkpoint import apply, load_tokenizer
from peft_jax.core.paths import dotted
from peft_jax.train import (
    Padded,
    State,
    encode,
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
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.sharding import PlacedBatches, make_mesh, parse_mesh, place, place_batch, shardings

STEPS, HALF = 20, 10


def trainer(mesh: Any) -> Callable[..., dict[str, Any]]:
    """A function that trains on a mesh (None for one device): from a checkpoint's folder, or from the start."""
    model = pj.AutoModelForCausalLM.from_pretrained("model", load_in_8bit=True)
    config = pj.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    model = pj.get_peft_model(model, config, key=jax.random.key(1))
    data = Padded(encode(read_data("data.json"), load_tokenizer("model"), cutoff_len=64).examples)
    batches, optimizer = training_batches(data, 16, seed=0), make_optimizer(0.01, STEPS)
    first, frozen = start(model, optimizer, seed=0)
    layout = None
    if mesh is not None:
        batches = PlacedBatches(batches, mesh)
        first, frozen = State(0, *place(tuple(first[1:]), mesh)), place(frozen, mesh)
        layout = (*shardings((first.trainable, first.opt_state), mesh), None)
    step = make_training_step(apply, optimizer, micro_batch_size=8, out_shardings=layout)
    evaluation = make_evaluation_step(apply)

    def run(*, save: str = "", load: str = "") -> dict[str, Any]:
        state, losses = State(0, *jax.tree.map(jnp.copy, tuple(first[1:]))), []
        if load:
            state, notes = Checkpoints(Path(load), keep=1).restore(first)
            losses = notes["losses"]
        before = parts((state.trainable, state.opt_state, frozen))
        for state, metrics in train(step, state, frozen, batches, max_steps=STEPS):  # noqa: B020
            losses.append(float(metrics.loss))
            if save and state.step == HALF:
                Checkpoints(Path(save), keep=1).save(state, {"losses": losses})
        held_out = evaluation_batches(data, 8)
        placed = held_out if mesh is None else (place_batch(batch, mesh) for batch in held_out)
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
    one, many = trainer(None), {text: trainer(make_mesh(parse_mesh(text))) for text in sys.argv[2:]}
    last = sys.argv[-1]
    found = {"one": one(save="from-1"), **{text: run(save=f"from-{text}") for text, run in many.items()}}
    found["many to one"] = one(load=f"from-{last}")
    found["one to many"] = many[last](load="from-1")
    print(json.dumps(found))
