"""Adapted trees in ``jax.export`` and ``flax.serialization``: the same tree and the same numbers come back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax import export

import peft_jax as pj
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
