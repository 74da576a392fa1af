"""Layers of Flax linen, Flax NNX and Equinox, unchanged: axes read off them, equal to merging first, side path kept."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from test_constructs import close, sizes_made

import peft_jax as pj
from peft_jax.adapt.infer_layouts import read_layouts
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight


@pytest.fixture(autouse=True)
def as_the_frameworks_want_it():
    """They mix element types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, IDS, IMAGE = normal(1, 2, 5, 8), jnp.array([[3, 0, 7], [1, 3, 3]]), normal(2, 1, 5, 7, 4)


# ---- Flax linen


def of_linen(module, *inputs):
    """Function and parameters of an unbound module."""
    return module.apply, module.init(jax.random.key(0), *inputs), inputs


def bound_linen(module, *inputs):
    """The same, where the function binds the module and calls a method of it."""
    variables = module.init(jax.random.key(0), *inputs)
    return lambda variables, *inputs: module.bind(variables).run(*inputs), variables, inputs


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return jnp.tanh(linen.Dense(8)(x)), None


class Stacked(linen.Module):
    """Three blocks in a scan, each perhaps rematerialised."""

    block: type = Block

    @linen.compact
    def __call__(self, x):
        layers = linen.scan(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


class Setup(linen.Module):
    def setup(self):
        self.up, self.down = linen.Dense(12), linen.Dense(8)

    def run(self, x):
        return self.down(jnp.tanh(self.up(x)))

    __call__ = run


class Tied(linen.Module):
    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(10, 8)
        return embed.attend(jnp.tanh(embed(ids)))


LINEN = {
    "Dense": lambda: of_linen(linen.Dense(12), X),
    "DenseGeneral": lambda: of_linen(linen.DenseGeneral((3, 4)), X),
    "DenseGeneral over two axes": lambda: of_linen(linen.DenseGeneral(6, axis=(-2, -1)), X),
    "Embed": lambda: of_linen(linen.Embed(10, 8), IDS),
    "Embed, tied": lambda: of_linen(Tied(), IDS),
    "Conv": lambda: of_linen(linen.Conv(6, (3, 3)), IMAGE),
    "Conv, strides": lambda: of_linen(linen.Conv(6, (3, 3), strides=2), IMAGE),
    "MultiHeadDotProductAttention": lambda: of_linen(linen.MultiHeadDotProductAttention(2), X),
    "scan": lambda: of_linen(Stacked(), X),
    "scan of remat": lambda: of_linen(Stacked(linen.remat(Block, prevent_cse=False)), X),
    "remat": lambda: of_linen(linen.remat(linen.Dense)(12), X),
    "bound": lambda: bound_linen(Setup(), X),
}


# ---- Flax NNX


def of_nnx(module, *inputs, call=lambda module, *inputs: module(*inputs)):
    graph, state = nnx.split(module)
    return lambda state, *inputs: call(nnx.merge(graph, state), *inputs), state, inputs


def rngs():
    return nnx.Rngs(0)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class Layers(nnx.Module):
    """Three layers, made by nnx.vmap and run by nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)

    def each(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


NNX = {
    "Linear": lambda: of_nnx(nnx.Linear(8, 12, rngs=rngs()), X),
    "LinearGeneral": lambda: of_nnx(nnx.LinearGeneral(8, (3, 4), rngs=rngs()), X),
    "Embed": lambda: of_nnx(nnx.Embed(10, 8, rngs=rngs()), IDS),
    "Conv": lambda: of_nnx(nnx.Conv(4, 6, (3, 3), rngs=rngs()), IMAGE),
    "MultiHeadAttention": lambda: of_nnx(nnx.MultiHeadAttention(2, 8, rngs=rngs(), decode=False), X),
    "scan": lambda: of_nnx(Layers(rngs()), X),
    "vmap over stacked modules": lambda: of_nnx(Layers(rngs()), X, call=Layers.each),
    "remat": lambda: of_nnx(Layer(rngs()), X, call=nnx.remat(lambda layer, x: layer(x))),
    "jit": lambda: of_nnx(Layer(rngs()), X, call=nnx.jit(lambda layer, x: layer(x))),
}


# ---- Equinox


def of_equinox(module, *inputs, depth=1, call=lambda module, *inputs: module(*inputs)):
    """A module and a function that maps it over the first axes of its inputs."""

    def fn(module, *inputs):
        mapped = lambda *inputs: call(module, *inputs)  # noqa: E731
        for _ in range(depth):
            mapped = jax.vmap(mapped)
        return mapped(*inputs)

    return fn, module, inputs


def stacked_mlp(module, x):
    arrays, static = eqx.partition(module, eqx.is_array)
    return jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]


KEY = jax.random.key(0)
EQUINOX = {
    "Linear": lambda: of_equinox(eqx.nn.Linear(8, 12, key=KEY), X, depth=2),
    "MLP": lambda: of_equinox(eqx.nn.MLP(8, 4, 12, 2, key=KEY), X, depth=2),
    "MLPs, stacked": lambda: of_equinox(
        eqx.filter_vmap(lambda key: eqx.nn.MLP(8, 8, 12, 1, key=key))(jax.random.split(KEY, 3)),
        X,
        depth=2,
        call=stacked_mlp,
    ),
    "MultiheadAttention": lambda: of_equinox(eqx.nn.MultiheadAttention(2, 8, key=KEY), X, X, X),
    "Conv2d": lambda: of_equinox(eqx.nn.Conv2d(4, 6, 3, key=KEY), jnp.moveaxis(IMAGE, -1, 1)),
    "Embedding": lambda: of_equinox(eqx.nn.Embedding(10, 8, key=KEY), IDS, depth=2),
}
GROUPS = {"linen": LINEN, "NNX": NNX, "Equinox": EQUINOX}
CASES = {f"{group}: {name}": make for group, rows in GROUPS.items() for name, make in rows.items()}


def loss_of(fn, frozen):
    return lambda trainable, *inputs: jnp.sum(jnp.sin(fn(pj.combine(trainable, frozen), *inputs)))


@pytest.mark.parametrize("name", CASES)
def test_a_layer_runs_unchanged(name):
    fn, params, inputs = CASES[name]()
    paths = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kernels = {path for path, leaf in paths.items() if getattr(leaf, "ndim", 0) > 1 and not path.endswith("bias")}
    config = pj.LoraConfig(r=5, target_modules=".*", init_lora_weights=False)
    adapted = pj.apply_lora(params, config, fn=fn, args=inputs)

    told = {leaf.path: leaf for leaf in pj.explain(fn, adapted, *inputs).leaves}
    assert set(told) == kernels
    assert not any(use.merged for leaf in told.values() for use in leaf.uses) and all(one.uses for one in told.values())

    ours, plain = pj.adapt(fn), lambda params, *inputs: fn(pj.merge(params), *inputs)
    got = jax.jit(lambda *inputs: ours(adapted, *inputs))(*inputs)
    close(got, plain(adapted, *inputs), 1e-5)
    assert not np.allclose(got, fn(params, *inputs)), "the adapter is dead"

    trainable, frozen = pj.partition(adapted)
    assert len(jax.tree.leaves(trainable)) == 2 * len(kernels)
    by = tuple(range(1 + sum(jnp.issubdtype(x.dtype, jnp.floating) for x in inputs)))
    grads = jax.grad(loss_of(ours, frozen), by)(trainable, *inputs)
    close(grads, jax.grad(loss_of(plain, frozen), by)(trainable, *inputs), 1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))

    layouts = {path: leaf.layout for path, leaf in found_weights(adapted)}
    sizes = {math.prod(paths[path].shape[i] for i in (*one.inp, *one.out)) for path, one in layouts.items()}
    program = jax.make_jaxpr(jax.grad(loss_of(ours, frozen)))(trainable, *inputs)
    assert not sizes & set(sizes_made(program.jaxpr)), "a weight was merged, or its gradient formed"


def found_weights(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return [(dotted(path), leaf) for path, leaf in leaves if is_weight(leaf)]


LAYOUTS = {
    "linen: DenseGeneral": {"params.kernel": pj.Layout((), (0,), (1, 2))},
    "linen: DenseGeneral over two axes": {"params.kernel": pj.Layout((), (0, 1), (2,))},
    "linen: Embed": {"params.embedding": pj.Layout(lookup=True)},
    "linen: Conv": {"params.kernel": pj.Layout((), (0, 1, 2), (3,))},
    "linen: scan": {"params.layers.Dense_0.kernel": pj.Layout((0,), (1,), (2,))},
    "NNX: scan": {"layers.dense.kernel": pj.Layout((0,), (1,), (2,))},
    "Equinox: Linear": {"weight": pj.Layout((), (1,), (0,))},
    "Equinox: Conv2d": {"weight": pj.Layout((), (1, 2, 3), (0,))},
    "Equinox: MLPs, stacked": {f"layers.{i}.weight": pj.Layout((0,), (2,), (1,)) for i in range(2)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_are_the_frameworks(name):
    fn, params, inputs = CASES[name]()
    read = read_layouts(params, fn, inputs)
    roles = lambda one: (one.stack, one.inp, one.out, one.lookup)  # noqa: E731
    assert {path: roles(one) for path, one in read.items()} == {p: roles(one) for p, one in LAYOUTS[name].items()}
