"""Trainers of frameworks on adapted models: what they select is what `partition` trains, and nothing else moves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peft_jax as pj
from peft_jax.core.weight import is_weight


@pytest.fixture(autouse=True)
def as_the_frameworks_want_it():
    """They mix element types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


X = jax.random.normal(jax.random.key(1), (6, 4))
TX = optax.sgd(0.01, momentum=0.9)


def run(model, x):
    return model(x)


def plain(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss_of(y):
    return jnp.mean((y - 1) ** 2)


def nnx_model():
    layers = nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.BatchNorm(8, rngs=nnx.Rngs(1))
    return nnx.Sequential(*layers, nnx.Linear(8, 2, rngs=nnx.Rngs(2)))


def plain_tree():
    keys = jax.random.split(jax.random.key(0))
    return {
        "up": {"kernel": jax.random.normal(keys[0], (4, 8))},
        "down": {"kernel": jax.random.normal(keys[1], (8, 2))},
    }


def adapted(kind, **fields):
    params, fn = (nnx_model(), run) if kind == "NNX" else (plain_tree(), plain)
    if kind == "int8":
        params = pj.quantize(params, fn=fn, args=(X,))
    config = pj.LoraConfig(r=2, target_modules="all-linear", **fields)
    return fn, pj.apply_lora(params, config, fn=fn, args=(X,))


@nnx.jit
def step(module, optimizer, x):
    """As the trainers of NNX write it, which know of no adapters but ``nnx.LoRAParam``."""
    grad = nnx.value_and_grad(lambda module: loss_of(module(x)), argnums=nnx.DiffState(0, nnx.LoRAParam))
    value, grads = grad(module)
    optimizer.update(module, grads)
    return value


def by_optax(fn, params, steps):
    trainable, frozen = pj.partition(params)
    state, losses = TX.init(trainable), []
    for _ in range(steps):
        loss = lambda trainable: loss_of(pj.adapt(fn)(pj.combine(trainable, frozen), X))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = TX.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(value)
    return losses, pj.combine(trainable, frozen)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True, "bias": "all"}], ids=["LoRA", "DoRA and biases"])
@pytest.mark.parametrize("kind", ["plain", "int8", "NNX"])
def test_a_trainer_that_selects_lora_params_trains_the_adapter_alone(kind, fields):
    if kind != "NNX":
        fields = {name: value for name, value in fields.items() if name != "bias"}  # it has none
    fn, params = adapted(kind, **fields)
    module = pj.nnx_module(fn, params)
    optimizer = nnx.Optimizer(module, TX, wrt=nnx.LoRAParam)
    losses = [step(module, optimizer, X) for _ in range(3)]
    fn, params = adapted(kind, **fields)
    want, trained = by_optax(fn, params, 3)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert losses[2] < losses[0]
    moved = jax.tree.leaves(pj.partition(module.params)[0])  # batch statistics move too, in the module alone
    for got, expected in zip(moved, jax.tree.leaves(pj.partition(trained)[0]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert jax.tree.structure(module.params) == jax.tree.structure(params)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.LoRAParam)))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(pj.partition(params)[0]))
    assert not jax.tree.leaves(nnx.state(module, lambda _, value: type(value) is nnx.Param))


def test_batch_statistics_are_those_of_the_module_in_training():
    fn, params = adapted("NNX")
    module = pj.nnx_module(fn, params)
    before = np.asarray(module.params.layers[2].mean[...])
    module(X)
    assert np.abs(np.asarray(module.params.layers[2].mean[...]) - before).max() > 1e-4
    assert np.abs(before).max() == 0


def test_the_whole_tree_has_no_gradient():
    for kind in ("plain", "int8"):
        fn, params = adapted(kind)
        with pytest.raises(TypeError, match=r"grad requires real- or complex-valued inputs.*got int"):
            jax.grad(lambda params, fn=fn: loss_of(pj.adapt(fn)(params, X)))(params)


def test_partitions_of_a_model_with_functions_among_its_leaves_go_through_jit_and_grad():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    fn = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    params = pj.apply_lora(model, pj.LoraConfig(r=2, target_modules="all-linear"), fn=fn, args=(X,))
    assert any(map(callable, jax.tree.leaves(params)))
    trainable, frozen = pj.partition(params)

    @jax.jit
    def step(trainable, frozen, state):
        loss = lambda trainable: loss_of(pj.adapt(fn)(pj.combine(trainable, frozen), X))  # noqa: E731
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = TX.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    trained, state, first = step(trainable, frozen, TX.init(trainable))
    _, _, second = step(trained, frozen, state)
    assert second < first and step._cache_size() == 1
    again = pj.combine(trained, frozen)
    assert again.activation is model.activation
    np.testing.assert_allclose(fn(pj.merge(again), X), pj.adapt(fn)(again, X), rtol=0, atol=1e-5)
    assert any(map(is_weight, jax.tree.leaves(again, is_leaf=is_weight)))
