"""Random programs that use weights in many ways: equal to merging, and no weight of a product is left out unsaid."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import doubled, gathered, tripled
from test_constructs import close

import peft_jax as pj
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight

PROGRAMS, QUICK = 24, 5  # the others are slow
LAYERS = 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 3


def cut(rng, w, axis):
    n = w.shape[axis]
    start, stride = int(rng.integers(0, n // 2)), int(rng.integers(1, 3))
    return jax.lax.slice_in_dim(w, start, n, stride, axis)


def moved(w):
    """Columns in another order, by axes that are split, moved and joined again."""
    n_in, n_out = w.shape
    if n_out % 2:
        return w
    return w.reshape(n_in, 2, n_out // 2).transpose(0, 2, 1).reshape(n_in, n_out)


def through_jit(w):
    return jax.jit(lambda w: jnp.pad(-w, ((0, 0), (1, 0))))(w)


# Each makes another matrix of a matrix; the numbers are drawn outside of the program, once for each use.
FOLLOWED = {
    "number": lambda rng, w: w * float(rng.uniform(0.5, 1.5)),
    "division": lambda rng, w: w / float(rng.uniform(0.5, 1.5)),
    "negative": lambda rng, w: -w,
    "transpose": lambda rng, w: w.T,
    "outputs": lambda rng, w: cut(rng, w, 1),
    "inputs": lambda rng, w: cut(rng, w, 0),
    "reverse": lambda rng, w: jnp.flip(w, int(rng.integers(0, 2))),
    "pad": lambda rng, w: jnp.pad(w, [tuple(map(int, rng.integers(0, 3, 2))) for _ in range(2)]),
    "split": lambda rng, w: jax.lax.split(w, (1, w.shape[1] - 1), 1)[1] if w.shape[1] > 2 else w,
    "moved": lambda rng, w: moved(w),
    "jit": lambda rng, w: through_jit(w),
    "checkpoint": lambda rng, w: jax.checkpoint(lambda w: 2 * w)(w),
    "device_put": lambda rng, w: jax.device_put(w),
    "custom_jvp": lambda rng, w: doubled(w),
    "custom_vjp": lambda rng, w: tripled(w),
}
LAST = {
    "fused": lambda rng, w: jnp.concatenate([w, -w / 2], axis=int(rng.integers(0, 2))),
    "alone": lambda rng, w: w,
}


def of_rows(rng, stack, x):
    """Each row has a layer of its own, as with experts."""
    return jnp.einsum("bi,bio->bo", x, stack[rng.integers(0, LAYERS, len(x))])


def scanned(layers, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]


def in_groups(rng, stack, x):
    return jax.lax.scan(lambda x, group: (scanned(group, x), None), x, stack.reshape(2, -1, *stack.shape[1:]))[0]


def on_devices(rng, stack, x):
    """Each device has a part of the inputs of a layer, and gathers the whole of it."""
    return gathered(stack[int(rng.integers(0, LAYERS))], x)


def mixed(rng, stack, x):
    """A product of two element types; backward the input's gradient would be rounded, here as there."""
    x = jax.lax.stop_gradient(x).astype(jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, stack[0], numbers, preferred_element_type=jnp.float32)


# What a program does with a stack of square matrices and an input of as many features.
STACKED = {
    "one": lambda rng, stack, x: x @ stack[int(rng.integers(0, LAYERS))],
    "by index": lambda rng, stack, x: x @ stack[jnp.asarray(rng.integers(0, LAYERS))],
    "of rows": of_rows,
    "scan": lambda rng, stack, x: scanned(stack, x),
    "scan backwards": lambda rng, stack, x: scanned(stack[::-1], x),
    "scan of groups": in_groups,
    "stacked again": lambda rng, stack, x: scanned(jnp.stack([stack[2], stack[0]]), x),
    "joined again": lambda rng, stack, x: scanned(jnp.concatenate([stack[2:], stack[:2]]), x),
    "all at once": lambda rng, stack, x: jnp.einsum("bi,lio->bo", x, stack),
    "shard_map": on_devices,
    "mixed": mixed,
}
LOSES = {"tanh": jnp.tanh, "square": lambda w: w * w, "sort": lambda w: jnp.sort(w, axis=1)}


def program(seed):
    """A function of four weights and an input, and which of them it loses on the way to their products."""
    plan = np.random.default_rng(seed)
    names = [f"w{i}" for i in range(4)]
    ways = {}
    lost = set()
    for name in names:
        way = list(plan.choice(list(FOLLOWED), int(plan.integers(0, 4))))
        if name != "w0" and plan.uniform() < 0.2:
            way.append(str(plan.choice(list(LOSES))))
            lost.add(name)
        way.append(str(plan.choice(list(LAST))))
        ways[name] = (way, int(plan.integers(0, 2**31)))
    stacked, stack_seed = str(plan.choice(list(STACKED))), int(plan.integers(0, 2**31))

    def fn(params, x):
        stack = params["layers"]["kernel"]
        x = x + STACKED[stacked](np.random.default_rng(stack_seed), stack, x)
        for name in names:
            way, own_seed = ways[name]
            rng, w = np.random.default_rng(own_seed), params[name]["kernel"]
            for step in way:
                w = LOSES[step](w) if step in LOSES else (FOLLOWED | LAST)[step](rng, w)
            repeats = -(-w.shape[0] // x.shape[1])
            x = jnp.tile(x, (1, repeats))[:, : w.shape[0]] @ w
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1)
        return x

    return fn, lost | ({"layers"} if stacked == "joined again" else set())  # two stacks have no layers in common


def seeds():
    """Those of the programs; all but a few are slow."""
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, PROGRAMS)]
    return [*range(QUICK), *slow]


@pytest.mark.parametrize("seed", seeds())
def test_a_random_program_equals_merging_and_leaves_nothing_out_unsaid(seed):
    fn, lost = program(seed)
    params = {f"w{i}": {"kernel": normal(i, 6, 8)} for i in range(4)}
    params["layers"] = {"kernel": normal(8, LAYERS, 8, 8)}
    x = 3 * normal(9, 8, 8)
    config = pj.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = pj.apply_lora(params, config, fn=fn, args=(x,))
    said = " ".join(str(one.message) for one in caught if "leaves out" in str(one.message))
    leaves = jax.tree_util.tree_leaves_with_path(adapted, is_leaf=is_weight)
    attached = {dotted(path).split(".")[0] for path, leaf in leaves if is_weight(leaf)}
    left = {name for name in params if f"'{name}.kernel'" in said}
    assert attached | left == set(params) and not attached & left and lost <= left
    assert len(left - lost) <= 1, "what can be followed is"  # not a joined axis of a weight of unknown axes that is cut

    layout = {r"layers\.kernel": pj.Layout((0,), (1,), (2,))}  # which nothing says of a stack that is not followed
    named = config.replace(target_modules=list(params))
    every = pj.apply_lora(params, named, layout=layout, fn=fn, args=(x,))
    trainable, frozen = pj.partition(every)

    def value(run):
        def loss(trainable, x):
            y = run(pj.combine(trainable, frozen), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)

    ((_, got), grads), ((_, want), wanted) = value(pj.adapt(fn)), value(lambda params, x: fn(pj.merge(params), x))
    close(got, want, 1e-5)
    close(grads, wanted, 1e-5)
    assert not np.allclose(got, fn(params, x)), "the adapter is dead"
    merged = {leaf.path.split(".")[0]: any(use.merged for use in leaf.uses) for leaf in pj.explain(fn, every, x).leaves}
    assert {name for name, is_merged in merged.items() if is_merged} >= lost
