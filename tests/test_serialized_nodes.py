"""Adapted trees and handles in ``jax.export`` and ``flax.serialization``: tree and numbers come back the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax import export

import peft_jax as pj
from peft_jax.cli.demo_data import MODEL
from peft_jax.core.adapted import Adapted
from peft_jax.core.serialized_nodes import _plain, _value

X = jax.random.normal(jax.random.key(1), (3, 64))
STACK = pj.Layout((0,), (1,), (2,))


def model(params, x):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["kernel"])[0]
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


def tree():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {"kernel": jax.random.normal(keys[0], (2, 64, 64)) / 8},
        "out": {"kernel": jax.random.normal(keys[1], (64, 64)) / 8, "bias": jax.random.normal(keys[2], (64,))},
    }


def adapted(kind, config):
    params = tree() if kind is None else pj.quantize(tree(), kind=kind, fn=model, args=(X,))
    return pj.apply_adapter(params, config, fn=model, args=(X,))


# name: (kind of quantization, config)
TREES = {
    "LoRA": (None, pj.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, bias="all")),
    "DoRA on int8": ("int8", pj.LoraConfig(r=2, target_modules="all-linear", use_dora=True, rank_pattern={"out": 1})),
    "IA3 on nf4": ("nf4", pj.IA3Config(target_modules=["out"], feedforward_modules=[], init_ia3_weights=False)),
    "OFT on int4": ("int4", pj.OFTConfig(oft_block_size=4, target_modules=["out"])),
    "LoHa on fp4": ("fp4", pj.LoHaConfig(r=2, target_modules="all-linear")),
}


@pytest.mark.parametrize("name", TREES)
def test_an_exported_program_takes_the_tree(name):
    pytest.importorskip("flatbuffers")
    params = adapted(*TREES[name])
    written = export.export(jax.jit(pj.adapt(model)))(params, X).serialize()
    got = export.deserialize(written).call(params, X)
    np.testing.assert_allclose(got, pj.adapt(model)(params, X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TREES)
def test_flax_writes_and_reads_the_tree_and_its_partitions(name):
    params = adapted(*TREES[name])
    for part in (params, *pj.partition(params)):
        zeros = jax.tree.map(jnp.zeros_like, part)
        again = serialization.from_bytes(zeros, serialization.to_bytes(part))
        assert jax.tree.structure(again) == jax.tree.structure(part)
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(part), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", TREES)
def test_static_fields_come_back_equal(name):
    for leaf in jax.tree.leaves(adapted(*TREES[name]), is_leaf=lambda node: isinstance(node, Adapted)):
        if not isinstance(leaf, jax.Array):
            for value in (leaf.layout, leaf.tag):
                again = _value(json.loads(json.dumps(_plain(value))))
                assert again == value and repr(again) == repr(value)


def test_no_other_class_is_made_and_other_values_are_refused():
    for kind in ("os:system", "peft_jax.core.layout:dataclasses", "builtins:dict"):
        with pytest.raises(ValueError, match=f"names '{kind}', which is no dataclass of peft_jax"):
            _value({"kind": kind, "of": {}})
    with pytest.raises(TypeError, match=r"cannot hold .*function.*pj\.merge\(params\)"):
        _plain((1, lambda x: x))


# ---- Model handles

IDS = jnp.array([[1, 2, 3, 4]])

HANDLES = {
    "LoRA": (None, pj.LoraConfig(r=2, init_lora_weights=False)),
    "DoRA on int8": ("int8", pj.LoraConfig(r=2, use_dora=True, target_modules="all-linear", modules_to_save=["norm"])),
    "prompt on nf4": ("nf4", pj.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("name", [pytest.param("LoRA", marks=pytest.mark.slow), "DoRA on int8", "prompt on nf4"])
def test_a_handle_comes_back_and_an_exported_program_takes_it(name):
    pytest.importorskip("flatbuffers")
    kind, config = HANDLES[name]
    base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
    model = pj.get_peft_model(base if kind is None else pj.quantize(base, kind=kind), config)
    run = jax.jit(lambda model, ids: model(ids))
    want = run(model, IDS).logits
    written = export.export(run)(model, IDS).serialize()
    got = export.deserialize(written).call(model, IDS)
    assert type(got) is type(run(model, IDS))
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())

    zeros = jax.tree.map(jnp.zeros_like, model)
    assert not np.allclose(run(zeros, IDS).logits, want)
    for again in (
        serialization.from_bytes(zeros, serialization.to_bytes(model)),
        serialization.from_state_dict(zeros, serialization.to_state_dict(model)),
    ):
        assert type(again) is type(model) and again.config == model.config
        assert jax.tree.structure(again) == jax.tree.structure(model)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(one, other)
