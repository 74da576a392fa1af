"""Nets of public packages, unchanged: adapted by `apply_lora(fn=, args=)` and `adapt` alone, in int8 too."""

import re
import warnings

import eqx_nets
import haiku_nets
import jax
import jax.numpy as jnp
import keras_nets
import numpy as np
import penzai_nets
import pytest
import rewritten_nets
import tunix_nets

import peft_jax as pj
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight

NETS = {
    **haiku_nets.NETS,
    **penzai_nets.NETS,
    **eqx_nets.NETS,
    **keras_nets.NETS,
    **tunix_nets.NETS,
    **rewritten_nets.NETS,
}


@pytest.fixture(autouse=True)
def as_the_packages_want_it():
    """They mix element types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def weights_of(params):
    """The adapted and quantized leaves of a tree, by their paths."""
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {dotted(path): leaf for path, leaf in found if is_weight(leaf)}


def close(got, want, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, np.abs(other).max()))


def outputs_and_gradients(run, params, inputs):
    """What a function gives, and gradients of the trained leaves."""
    trainable, frozen = pj.partition(params)

    def loss(trainable, inputs):
        outs = run(pj.combine(trainable, frozen), *inputs)
        total = 0.0
        for y in jax.tree.leaves(outs):
            total += jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))
        return total, outs

    (_, outs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, inputs)
    return outs, gradients


@pytest.mark.parametrize("name", NETS)
def test_a_public_net_is_adapted_unchanged(name):
    net = NETS[name]()
    config = pj.LoraConfig(r=4, target_modules=net.targets, init_lora_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = pj.apply_lora(net.params, config, fn=net.fn, args=net.inputs)
    said = " ".join(str(one.message) for one in caught if "leaves out" in str(one.message))
    assert re.search(net.left_out, said) if net.left_out else not said
    used = pj.explain(net.fn, adapted, *net.inputs)
    assert not used.unused
    for leaf in used.leaves:
        assert any(use.merged for use in leaf.uses) == net.is_merged, str(leaf)

    outs, gradients = outputs_and_gradients(pj.adapt(net.fn), adapted, net.inputs)
    want, wanted = outputs_and_gradients(lambda params, *inputs: net.fn(pj.merge(params), *inputs), adapted, net.inputs)
    close(outs, want)
    close(gradients, wanted)
    before = net.fn(net.params, *net.inputs)
    moved = [
        np.abs(one - other).max() for one, other in zip(jax.tree.leaves(outs), jax.tree.leaves(before), strict=True)
    ]
    assert max(moved) > 1e-3, "the adapter is dead"
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(gradient), f"{dotted(path)} has no gradient"

    targets = {} if net.targets == "all-linear" else {"target_modules": net.targets}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if net.left_out else "default")
        quantized = pj.quantize(net.params, fn=net.fn, args=net.inputs, **targets)
        both = pj.apply_lora(quantized, config, fn=net.fn, args=net.inputs)
    assert set(weights_of(adapted)) <= set(weights_of(quantized))
    close(jax.jit(pj.adapt(net.fn))(both, *net.inputs), jax.jit(net.fn)(pj.merge(both), *net.inputs))


@pytest.mark.usefixtures("optimizing_compiler")
def test_a_public_net_costs_what_lora_by_hand_costs():
    """By hand: an interceptor of haiku's linear layers."""
    fn, params, ids = haiku_nets.decoder(width=64, layers=2)
    config = pj.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = pj.apply_lora(params, config, fn=fn, args=(ids,))
    factors = {}
    for path, leaf in weights_of(adapted).items():
        module = path.removesuffix(".w")
        factors[module] = (leaf.params["lora_A"], leaf.params["lora_B"])
    scaling = config.lora_alpha / config.r
    trainable, frozen = pj.partition(adapted)

    def ours(trainable, ids):
        return jnp.sum(jnp.sin(pj.adapt(fn)(pj.combine(trainable, frozen), ids)))

    def by_hand(factors, ids):
        return jnp.sum(jnp.sin(haiku_nets.with_lora(fn, factors, scaling)(params, ids)))

    close(ours(trainable, ids), by_hand(factors, ids))
    costs = []
    for loss, trained in ((ours, trainable), (by_hand, factors)):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trained, ids).compile()
        costs.append(compiled.cost_analysis()["flops"])
    print(f"{costs[0] / costs[1]:.4f} of the operations of LoRA by hand")
    assert costs[0] <= 1.02 * costs[1]
