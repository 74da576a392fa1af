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
    "linen: Conv": {"params.kernel": pj.Layout((), (2, 0, 1), (3,))},
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


# ---- State that a module changes


class Stateful(nnx.Module):
    """Batch statistics, random numbers, a variable of one's own, a new variable and a static attribute."""

    def __init__(self, rngs):
        self.up, self.norm = nnx.Linear(8, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.drop, self.calls = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        h = self.norm(self.up(x))
        self.seen, self.name = nnx.Intermediate(h), "called"
        return self.drop(h)


def stateful():
    """An adapted module, and the same module merged."""
    config = pj.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    adapted = pj.apply_lora(Stateful(rngs()), config)
    return adapted, pj.merge(adapted)


def state_of(module):
    """All variables but parameters, random keys as numbers."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))
    is_key = lambda array: jnp.issubdtype(array.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda array: jax.random.key_data(array) if is_key(array) else array, state)


@pytest.mark.parametrize("wrap", [lambda fn: fn, nnx.jit], ids=["eager", "jit"])
def test_a_module_keeps_the_state_that_a_call_changes(wrap):
    adapted, plain = stateful()
    call = lambda module, x: module(x)  # noqa: E731
    ours, theirs = wrap(pj.adapt(call)), wrap(call)
    outs = [ours(adapted, X) for _ in range(3)]
    close(outs, [theirs(plain, X) for _ in range(3)], 1e-5)
    assert not np.array_equal(outs[0] == 0, outs[1] == 0), "the dropout mask repeats"
    assert int(adapted.calls[...]) == 3 and int(adapted.drop.rngs.count[...]) == 3 and adapted.name == "called"
    assert jax.tree.structure(state_of(adapted)) == jax.tree.structure(state_of(plain))
    close(state_of(adapted), state_of(plain), 1e-5)
    assert is_weight(adapted.up.kernel.get_value()), "the adapter stays"


def test_state_is_kept_beside_a_gradient_too():
    """By nnx.grad with respect to the input, and through twins inside of jax.value_and_grad."""
    adapted, plain = stateful()
    loss = lambda x, module, fn: jnp.sum(jnp.sin(fn(module, x)))  # noqa: E731
    call = lambda module, x: module(x)  # noqa: E731
    ours, theirs = (nnx.grad(lambda x, module, fn=fn: loss(x, module, fn)) for fn in (pj.adapt(call), call))
    close([ours(X, adapted) for _ in range(2)], [theirs(X, plain) for _ in range(2)], 1e-4)
    close(state_of(adapted), state_of(plain), 1e-5)

    trainable, frozen = pj.partition(adapted)

    def loss_and_state(trainable, frozen, x):
        module = pj.combine(trainable, frozen)
        value = loss(x, module, pj.adapt(call))
        return value, nnx.state(module, (nnx.BatchStat, nnx.RngState))

    (value, state), _ = jax.jit(jax.value_and_grad(loss_and_state, has_aux=True))(trainable, frozen, X)
    close(value, loss(X, plain, call), 1e-5)
    nnx.update(adapted, state)
    close(adapted.norm.mean[...], plain.norm.mean[...], 1e-5)
    assert int(adapted.drop.rngs.count[...]) == int(plain.drop.rngs.count[...]) == 3


def test_variables_of_a_state_are_changed_as_without_adapt():
    """nnx.merge takes the variables of the state that it gets, and so does a call of the module change them."""
    adapted, plain = stateful()
    states = []
    for module, wrap in ((adapted, pj.adapt), (plain, lambda fn: fn)):
        graph, state = nnx.split(module)
        fn = wrap(lambda state, x, graph=graph: nnx.merge(graph, state)(x))
        fn(state, X)
        fn(state, X)
        states.append(state)
    assert int(states[0]["calls"][...]) == int(states[1]["calls"][...]) == 2
    close(states[0]["norm"]["mean"][...], states[1]["norm"]["mean"][...], 1e-5)


def test_state_that_would_be_lost_is_an_error_that_leaves_the_module_whole():
    adapted, _ = stateful()
    call = pj.adapt(lambda module, x: module(x))
    before = jax.tree.leaves(state_of(adapted))
    with pytest.raises(ValueError, match=r"changes \['calls', 'drop.rngs.count', 'norm.mean'.*nnx.jit or nnx.grad"):
        jax.jit(lambda x: call(adapted, x))(X)
    close(jax.tree.leaves(state_of(adapted)), before, 0)
    close(jax.jit(lambda x: pj.adapt(lambda module, x: module.up(x))(adapted, x))(X), pj.merge(adapted).up(X), 1e-5)

    def doubling(module, x):
        module.up.kernel[...] = 2 * module.up.kernel[...]
        return module(x)

    with pytest.raises(ValueError, match=r"changes \['up.kernel'\], adapted or quantized.*outside of pj.adapt"):
        pj.adapt(doubling)(adapted, X)


def test_a_module_beside_adapted_leaves_keeps_its_state_too():
    """One that has no adapted leaf itself, given by name, and one variable under two names."""
    kernel = pj.apply_lora({"up": {"kernel": normal(0, 8, 6)}}, pj.LoraConfig(r=2, target_modules=["up"]))
    norm = nnx.BatchNorm(6, rngs=rngs())
    count = nnx.Variable(jnp.zeros(()))

    def fn(params, x, *, norm, counts):
        counts[0][...] += 1
        counts[1][...] += 1
        return norm(x @ params["up"]["kernel"])

    pj.adapt(fn)(kernel, X, norm=norm, counts=[count, count])
    assert float(count[...]) == 2 and float(jnp.abs(norm.mean[...]).max()) > 0


def test_state_of_linen_and_equinox_is_returned_and_so_kept():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(linen.Dense(6)(x))

    net = Linen()
    variables = net.init(jax.random.key(0), X)
    config = pj.LoraConfig(r=2, target_modules=["Dense_0"], init_lora_weights=False)
    adapted = pj.apply_lora(variables, config)
    run = lambda variables, x: net.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    got, want = pj.adapt(run)(adapted, X), run(pj.merge(adapted), X)
    close(got, want, 1e-5)
    assert float(jnp.abs(got[1]["batch_stats"]["BatchNorm_0"]["mean"]).max()) > 0

    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, "batch", mode="batch")
    layer = pj.apply_lora({"up": {"kernel": normal(0, 8, 8)}}, config.replace(target_modules=["up"]))

    def step(params, state, x):
        h = x @ params["up"]["kernel"]
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(h, state)

    rows = X.reshape(-1, 8)
    got, want = pj.adapt(step)(layer, state, rows), step(pj.merge(layer), state, rows)
    close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)
