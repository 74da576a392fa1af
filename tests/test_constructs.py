"""Every construct, in three modes: equal to merging first and to a formula, and on the side path where there is one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import ROWS, STACK, TAPS, Row, conv
from jax.extend.core import Literal

import peft_jax as pj


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make(row, *, bits=None, r=3, shape=None):
    tree = {"layers": {"dense": {row.name: normal(0, *(shape or row.shape))}}}
    table = {".*": row.layout} if row.layout else None
    if bits:
        tree = pj.quantize(tree, bits, layout=table)
    config = pj.LoraConfig(r=r, target_modules=".*dense.*", init_lora_weights=False)
    return pj.apply_lora(tree, config, layout=table)["layers"]["dense"][row.name]


def loss_of(fn, frozen):
    def loss(trainable, x):
        out = fn(pj.combine(trainable, frozen), x)
        return sum(jnp.sum(jnp.sin(array.astype(jnp.float32))) for array in jax.tree.leaves(out))

    return loss


def close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


NOT_DIFFERENTIABLE = ("while_loop", "Pallas call on activations")
every_row = pytest.mark.parametrize("name", ROWS)


MODES = ["eager", "jit", "grad", "int8"]


@pytest.mark.parametrize("mode", MODES)
@every_row
def test_equals_merging_first_and_the_formula(name, mode):
    row = ROWS[name]
    leaf, x = make(row, bits=8 if mode == "int8" else None), normal(1, *row.x)
    ours, plain = pj.adapt(row.fn), jax.jit(lambda leaf, x: row.fn(leaf.dense(), x))
    if mode != "grad":
        got = (ours if mode == "eager" else jax.jit(ours))(leaf, x)
        close(got, plain(leaf, x), row.tolerance)
        close(got, row.formula(np.asarray(leaf.dense(), np.float64), np.asarray(x, np.float64)), row.tolerance)
        base = plain(dataclasses.replace(leaf, params=jax.tree.map(jnp.zeros_like, leaf.params)), x)
        alive = [not np.allclose(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(base), strict=True)]
        assert any(alive), "the adapter is dead"
        return
    trainable, frozen = pj.partition(leaf)
    ours, plain = (jax.jit(jax.grad(loss_of(fn, frozen), argnums=(0, 1))) for fn in (ours, plain))
    try:
        want = plain(trainable, x)
    except Exception as error:  # what JAX cannot differentiate is the same error through us
        with pytest.raises(type(error)):
            ours(trainable, x)
        assert name in NOT_DIFFERENTIABLE
        return
    close(ours(trainable, x), want, row.tolerance)


MOVES = "transpose reshape squeeze slice dynamic_slice copy convert_element_type stop_gradient pvary pcast".split()
MOVES += "optimization_barrier sharding_constraint jit scan".split()
# Moves where the plain program has them: it moves the base by them too.
MOVES_OF_PROGRAMS = {"rev", "device_put", "all_gather", "stack", "gather"}


def inner_jaxprs(eqn):
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
        if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
            yield getattr(inner, "jaxpr", inner)


def primitives_in(jaxpr):
    """Names of all primitives of a jaxpr, nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in inner_jaxprs(eqn):
            yield from primitives_in(inner)


def sizes_made(jaxpr, moves=()):
    """Sizes of all that a jaxpr computes, nested jaxprs included; moves and constants count for nothing."""
    for eqn in jaxpr.eqns:
        is_constant = eqn.primitive.name == "broadcast_in_dim" and isinstance(eqn.invars[0], Literal)
        if eqn.primitive.name not in (*MOVES, *moves) and not is_constant:
            yield from (math.prod(var.aval.shape) for var in eqn.outvars if hasattr(var.aval, "shape"))
        for inner in inner_jaxprs(eqn):
            yield from sizes_made(inner, moves)


# The tangents of a Hessian, one for each input, have the weight's size in every program.
@pytest.mark.parametrize("name", [name for name in ROWS if name != "hessian inside"])
def test_no_array_of_the_weights_size_is_made_where_there_is_a_side_path(name):
    """Neither forward nor backward merges the weight or forms its gradient; elsewhere they do, so the test can fail."""
    row = ROWS[name]
    leaf, x = make(row, r=5), normal(1, *row.x)
    trainable, frozen = pj.partition(leaf)
    loss = loss_of(pj.adapt(row.fn), frozen)
    program = jax.make_jaxpr(loss if name in NOT_DIFFERENTIABLE else jax.grad(loss))(trainable, x)
    layer = math.prod(n for axis, n in enumerate(row.shape) if axis not in leaf.layout.stack)
    local = {layer // 2} if name.startswith("shard_map, weight split") else set()
    plain = jax.make_jaxpr(row.fn)(jnp.ones(row.shape), x)
    moves = MOVES_OF_PROGRAMS & set(primitives_in(plain.jaxpr))
    formed = {layer, math.prod(row.shape), *local} & set(sizes_made(program.jaxpr, moves))
    assert bool(formed) != row.side_path


def by_hand_lookup(w, a, b, x):
    ids = jnp.arange(32) % 7
    return w[ids] + a[ids] @ b


def by_hand_conv(w, a, b, x):
    return conv(w, x) + conv(a.reshape(3, 3, 32, 4), x) @ b


def by_hand_ragged(w, a, b, x):
    sizes = jnp.array([10, 20, 30, 4])
    return jax.lax.ragged_dot(x, w, sizes) + jax.lax.ragged_dot(jax.lax.ragged_dot(x, a, sizes), b, sizes)


def by_hand_layers(w, a, b, x):
    return jax.lax.scan(lambda h, p: (jnp.tanh(h @ p[0] + h @ p[1] @ p[2]), None), x, (w, a, b))[0]


# name: (function of a dense weight, the same with LoRA written out, shapes of weight and input, layout)
BY_HAND = {
    "x @ w": (lambda w, x: x @ w, lambda w, a, b, x: x @ w + x @ a @ b, (64, 96), (32, 64), None),
    "w.T": (lambda w, x: x @ w.T, lambda w, a, b, x: x @ w.T + x @ b.T @ a.T, (64, 96), (32, 96), None),
    "heads": (
        lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(64, 8, 12)),
        lambda w, a, b, x: (x @ w + x @ a @ b).reshape(32, 8, 12),
        (64, 96),
        (32, 64),
        None,
    ),
    "lookup": (lambda w, x: w[jnp.arange(32) % 7], by_hand_lookup, (64, 96), (1,), None),
    "conv": (conv, by_hand_conv, (3, 3, 32, 48), (2, 8, 8, 32), TAPS[2]),
    "ragged_dot": (
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([10, 20, 30, 4])),
        by_hand_ragged,
        (4, 64, 96),
        (64, 64),
        STACK,
    ),
    "vmap over a stack": (
        lambda w, x: jax.vmap(lambda w: x @ w)(w),
        lambda w, a, b, x: jax.vmap(lambda w, a, b: x @ w + x @ a @ b)(w, a, b),
        (4, 64, 96),
        (32, 64),
        STACK,
    ),
    "vmap of lookups": (
        lambda w, x: jax.vmap(lambda w: w[jnp.arange(32) % 7])(w),
        lambda w, a, b, x: jax.vmap(lambda w, a, b: by_hand_lookup(w, a, b, x))(w, a, b),
        (4, 64, 96),
        (1,),
        STACK,
    ),
    "scan over layers": (
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0],
        by_hand_layers,
        (4, 64, 64),
        (32, 64),
        STACK,
    ),
}


@pytest.mark.usefixtures("optimizing_compiler")
@pytest.mark.parametrize("name", BY_HAND)
def test_compiles_to_the_operations_of_lora_written_by_hand(name):
    fn, hand, shape, x, layout = BY_HAND[name]
    row = Row(fn, fn, shape, layout)
    leaf, x = make(row, r=4), normal(1, *x)
    trainable, frozen = pj.partition(leaf)

    def loss(pair, w, scale, x):
        a, b = pair
        return jnp.sum(jnp.sin(hand(w, a * scale[..., None, None], b, x)))

    pair = (leaf.params["lora_A"], leaf.params["lora_B"])
    grad = jax.grad(loss_of(pj.adapt(fn), frozen)), jax.grad(loss)
    args = (trainable, x), (pair, leaf.base, leaf.state["scaling"], x)
    np.testing.assert_allclose(
        hand(leaf.base, pair[0] * leaf.state["scaling"][..., None, None], pair[1], x),
        pj.adapt(fn)(leaf, x),
        rtol=0,
        atol=1e-4,
    )
    ours, theirs = (
        jax.jit(f).lower(*given).compile().cost_analysis()["flops"] for f, given in zip(grad, args, strict=True)
    )
    merging = jax.jit(jax.grad(loss_of(lambda leaf, x: fn(leaf.dense(), x), frozen))).lower(trainable, x).compile()
    assert ours == pytest.approx(theirs, rel=0.01)
    assert merging.cost_analysis()["flops"] > 1.1 * ours, "the measure would not see a merged weight"


def test_without_weights_it_is_the_function_itself():
    calls = []
    assert pj.adapt(lambda w: calls.append(w) or w)("not an array") == "not an array" and len(calls) == 1


def test_static_arguments_and_leaves_that_are_no_arrays():
    leaf = make(ROWS["x @ w"])
    model = {"act": jnp.tanh, "kernel": leaf, "name": "model", "none": None}

    def fn(model, x, times, *, name):
        return model["act"](x @ model["kernel"]) * times, {name: x}

    x = normal(1, 5, 8)
    got = pj.adapt(fn)(model, x, 2, name="x")
    close(got, fn({**model, "kernel": leaf.dense()}, x, 2, name="x"), 1e-5)
    jitted = jax.jit(
        lambda kernel, x, times: pj.adapt(fn)({**model, "kernel": kernel}, x, times, name="x"), static_argnums=2
    )
    close(jitted(leaf, x, 2), got, 1e-5)


def test_vmap_over_adapters_runs_each_on_one_base():
    base = {"dense": {"kernel": normal(0, 8, 6)}}
    config = pj.LoraConfig(r=3, target_modules=["dense"], init_lora_weights=False)
    adapters = [pj.apply_lora(base, config, key=jax.random.key(i)) for i in range(4)]
    twins = [pj.partition(params) for params in adapters]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(trainable for trainable, _ in twins))
    fn = pj.adapt(lambda params, x: jnp.tanh(x @ params["dense"]["kernel"]))
    x = normal(1, 4, 5, 8)
    run = jax.vmap(lambda trainable, x: fn(pj.combine(trainable, twins[0][1]), x))
    close(run(stacked, x), jnp.stack([fn(params, one) for params, one in zip(adapters, x, strict=True)]), 1e-5)
    made = set(sizes_made(jax.make_jaxpr(run)(stacked, x).jaxpr))
    assert not {8 * 6, 4 * 8 * 6} & made


def test_forward_and_second_derivatives_equal_those_of_merging():
    leaf, x = make(Row(lambda w, x: jnp.tanh(x @ w), None, (3, 2))), normal(1, 4, 3)
    fn = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    trainable, frozen = pj.partition(leaf)
    ours, plain = (loss_of(f, frozen) for f in (pj.adapt(fn), lambda leaf, x: fn(leaf.dense(), x)))
    tangent = jax.tree.map(jnp.ones_like, trainable)
    for derive in (
        lambda f: jax.jvp(lambda t: f(t, x), (trainable,), (tangent,)),
        lambda f: jax.hessian(f)(trainable, x),
    ):
        close(derive(ours), derive(plain), 1e-5)
        assert all(np.abs(array).max() > 0 for array in jax.tree.leaves(derive(plain)))


def test_donating_one_model_leaves_another_alone():
    base = {"dense": {"kernel": normal(0, 8, 8)}}
    config = pj.LoraConfig(r=3, target_modules=["dense"])
    one, other = (pj.apply_lora(base, config, adapter_name=name) for name in "ab")
    trainable, frozen = pj.partition(one)
    jax.jit(lambda t: jax.tree.map(lambda leaf: leaf + 1, t), donate_argnums=0)(trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((other, frozen, base)))


def test_an_inner_jit_that_donates_its_weight_leaves_the_leaf_alone():
    leaf, x = make(ROWS["x @ w"]), normal(1, 5, 8)
    fn = pj.adapt(lambda w, x: jax.jit(lambda w: x @ w, donate_argnums=0)(w.T))
    close(fn(leaf, x), fn(leaf, x), 1e-6)


def test_a_transposed_product_keeps_its_accumulation_type():
    leaf, x = make(ROWS["lookup"], shape=(64, 256)).astype(jnp.bfloat16), normal(1, 3, 256).astype(jnp.bfloat16)
    fn = lambda w, x: jnp.einsum("bd,vd->bv", x, w, preferred_element_type=jnp.float32)  # noqa: E731
    fresh = dataclasses.replace(leaf, params=jax.tree.map(jnp.zeros_like, leaf.params))
    close(pj.adapt(fn)(fresh, x), fn(fresh.dense(), x), 1e-5)


def test_adapt_inside_a_loop_over_layers_sees_one_layer():
    leaf, x = make(ROWS["scan over layers"]), normal(1, 5, 8)
    step = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    ours, plain = pj.adapt(step), leaf.dense()
    got = jax.lax.scan(lambda h, w: (ours(w, h), None), x, leaf)[0]
    close(got, jax.lax.scan(lambda h, w: (step(w, h), None), x, plain)[0], 1e-5)
    close(jax.vmap(ours, (0, None))(leaf, x), jax.vmap(step, (0, None))(plain, x), 1e-5)
    turned = make(ROWS["stack in the middle"])
    with pytest.raises(ValueError, match="sliced or stacked outside of pj.adapt.*Put the loop into the function"):
        ours(jax.tree.map(lambda array: array[0], turned), x)


def test_effects_happen_once_and_in_order():
    seen = []
    leaf, x = make(ROWS["x @ w"]), normal(1, 5, 8)

    def fn(w, x):
        for i in range(3):
            jax.debug.callback(lambda i=i: seen.append(i), ordered=True)
        jax.debug.callback(lambda w: seen.append(w.shape), w)  # takes the weight itself: it merges
        return x @ w

    jax.jit(pj.adapt(fn))(leaf, x).block_until_ready()
    jax.effects_barrier()
    assert [item for item in seen if isinstance(item, int)] == [0, 1, 2] and seen.count((8, 8)) == 1


def test_the_second_call_traces_nothing_and_swapping_adapters_compiles_nothing():
    traces = []

    def fn(params, x):
        traces.append(1)
        return jnp.take(x @ params["dense"]["kernel"], jnp.array([0]), axis=0)

    base = {"dense": {"kernel": normal(0, 8, 8)}}
    run = jax.jit(pj.adapt(fn))
    for i in range(3):
        config = pj.LoraConfig(r=3, lora_alpha=i + 1, target_modules=["dense"])
        run(pj.apply_lora(base, config, adapter_name=str(i), key=jax.random.key(i)), normal(1, 5, 8))
    assert len(traces) == 1 and run._cache_size() == 1


@pytest.mark.parametrize("name", ["elementwise", "custom_vjp on the weight", "returned", "norm of the weight"])
def test_merging_with_dropout_on_is_an_error_that_names_the_primitive(name):
    config = pj.LoraConfig(r=3, target_modules=["dense"], lora_dropout=0.5)
    params = pj.with_dropout(pj.apply_lora({"dense": {"kernel": normal(0, 8, 8)}}, config), jax.random.key(0))
    with pytest.raises(ValueError, match=r"(Primitive '\w+' takes|output is) a weight that has to be merged.*dropout"):
        pj.adapt(ROWS[name].fn)(params["dense"]["kernel"], normal(1, 5, 8))


@pytest.mark.parametrize(
    "name", ["x @ w", "split into heads", "conv 2-D", "ragged_dot", "scan over layers", "vmap over a stack"]
)
def test_dropout_is_on_the_side_path(name):
    row = ROWS[name]
    leaf, x = make(row), normal(1, *row.x)
    leaf = dataclasses.replace(
        leaf, tag=dataclasses.replace(leaf.tag, config=leaf.tag.config.replace(lora_dropout=0.5))
    )
    noisy = [
        pj.adapt(row.fn)(
            pj.with_dropout({"layers": {"dense": {"kernel": leaf}}}, jax.random.key(i))["layers"]["dense"]["kernel"], x
        )
        for i in (0, 0, 1)
    ]
    close(noisy[0], noisy[1], 1e-6)
    assert not np.allclose(*(jax.tree.leaves(noisy[i])[0] for i in (0, 2)))
