"""Random small programs made of the rules: running over adapted leaves equals merging first, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_jax as pj

STACK = pj.Layout((0,), (1,), (2,))
HEADS = pj.Layout((), (0,), (1, 2))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


TREE = {
    "layers": {"flat": {"kernel": normal(0, 6, 6)}, "stack": {"kernel": normal(1, 2, 6, 6)}},
    "heads": {"kernel": normal(2, 6, 2, 3)},
}
LAYOUTS = {r"layers\.stack.*": STACK, r"heads.*": HEADS}
CONFIG = pj.LoraConfig(r=2, target_modules=".*", init_lora_weights=False)

# How a program may see a weight on its way: same shape in and out, so that any sequence of them is a program.
MOVES = {
    "as it is": lambda w: w,
    "turned twice": lambda w: w.T.T,
    "transposed": lambda w: w.T,
    "split and joined": lambda w: w.reshape(6, 2, 3).reshape(6, 6),
    "heads swapped": lambda w: w.reshape(6, 2, 3).transpose(0, 2, 1).reshape(6, 6),
    "rows swapped": lambda w: w.reshape(3, 2, 6).transpose(1, 0, 2).reshape(6, 6),
    "expanded": lambda w: jnp.squeeze(jnp.expand_dims(w, (0, 2)), (0, 2)),
    "cast": lambda w: w.astype(jnp.float32),
    "copied": lambda w: jnp.array(w, copy=True),
    "barrier": lambda w: jax.lax.optimization_barrier(w),
    "jitted": lambda w: jax.jit(lambda w: w.T)(w),
    "scaled": lambda w: w * 2,
    "cut": lambda w: jnp.concatenate([w[:, 3:], w[:, :3]], axis=1),
}
# Where the weight comes from.
SOURCES = {
    "flat": lambda p: p["layers"]["flat"]["kernel"],
    "first of stack": lambda p: p["layers"]["stack"]["kernel"][0],
    "last of stack": lambda p: p["layers"]["stack"]["kernel"][-1],
    "computed of stack": lambda p: p["layers"]["stack"]["kernel"][jnp.int32(1)],
    "heads": lambda p: p["heads"]["kernel"].reshape(6, 6),
}
# What a program does with it and the activations (4, 6).
USES = {
    "x @ w": lambda h, w: h @ w,
    "w @ x": lambda h, w: (w @ h.T).T,
    "einsum": lambda h, w: jnp.einsum("io,bi->bo", w, h),
    "heads": lambda h, w: jnp.einsum("bi,iho->bho", h, w.reshape(6, 2, 3)).reshape(4, 6),
    "vmap": lambda h, w: jax.vmap(lambda row: row @ w)(h),
    "lookup": lambda h, w: h + w[jnp.array([5, 0, 0, 3])],
    "checkpoint": lambda h, w: jax.checkpoint(lambda h: h @ w)(h),
    "loop": lambda h, w: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), h),
    "scan": lambda h, w: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=2)[0],
    "cond": lambda h, w: jax.lax.cond(h[0, 0] > 0, lambda w: h @ w, lambda w: h @ w.T, w),
    "grad": lambda h, w: jax.grad(lambda h: jnp.sum(jnp.sin(h @ w)))(h),
    "added": lambda h, w: h + w[:4],
}
steps = st.lists(
    st.tuples(
        st.sampled_from(sorted(SOURCES)),
        st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
        st.sampled_from(sorted(USES)),
    ),
    min_size=1,
    max_size=4,
)


def program(plan):
    def run(params, h):
        for source, moves, use in plan:
            w = functools.reduce(lambda w, move: MOVES[move](w), moves, SOURCES[source](params))
            h = jnp.tanh(USES[use](h, w) / 3)
        return h

    return run


def check(fn, params, x):
    trainable, frozen = pj.partition(params)

    def both(run):
        def loss(trainable, x):
            y = run(pj.combine(trainable, frozen), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)

    ours, merging = both(pj.adapt(fn)), both(lambda params, x: fn(pj.merge(params), x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(merging), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@settings(max_examples=16, deadline=None, derandomize=True)
@given(plan=steps, bits=st.sampled_from([None, 8]))
def test_equals_merging_first_in_value_and_gradient(plan, bits):
    tree = pj.quantize(TREE, bits, layout=LAYOUTS) if bits else TREE
    check(program(plan), pj.apply_lora(tree, CONFIG, layout=LAYOUTS), normal(3, 4, 6))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(plan=steps)
def test_scanning_the_program_over_layers_changes_nothing(plan):
    """Each layer of a stack of three is the weight of one run of the program."""
    plan = [("flat", moves, use) for _, moves, use in plan]
    tree = {"layers": {"flat": {"kernel": normal(4, 3, 6, 6)}}}
    body = lambda h, layer: (program(plan)({"layers": layer}, h), None)  # noqa: E731
    fn = lambda params, x: jax.lax.scan(body, x, params["layers"])[0]  # noqa: E731
    check(fn, pj.apply_lora(tree, CONFIG, layout={".*": STACK}), normal(3, 4, 6))
