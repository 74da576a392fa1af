"""A weight that all-linear or quantize leaves out, as it reaches its product through what is not followed, is named."""

import re

import jax
import jax.numpy as jnp
import pytest
from constructs import ROWS, clipped_gradient, halved_tangent, own_matmul
from jax.experimental import pallas as pl

import peft_jax as pj
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X = normal(1, 5, 8)
ALL = pj.LoraConfig(r=2, target_modules="all-linear")


def looped(w, x):
    """A weight that a loop carries, and turns."""
    return jax.lax.fori_loop(0, 2, lambda i, s: (s[0].T, jnp.tanh(s[1] @ s[0])), (w, x))[1]


def in_a_kernel(w, x):
    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((5, 8), x.dtype), interpret=True)(x, w)


def scanned(w, x):
    """Layers of one weight, each bounded."""
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ jnp.tanh(layer)), None), x, w.reshape(1, 8, 8))[0]


def resharded(w, x):
    """Devices have rows of the weight, and then columns."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("fsdp")
    local = lambda w, x: x @ jax.lax.all_to_all(w, "fsdp", 1, 0, tiled=True)  # noqa: E731
    whole, columns = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, "fsdp")
    return jax.shard_map(local, mesh=mesh, in_specs=(spec, whole), out_specs=columns)(w, x)


# How a program uses a weight (8, 8), and the primitive through which it is not followed.
LOSES = {
    "squared": (lambda w, x: x @ w**2, "(integer_pow|square)"),
    "bounded": (lambda w, x: x @ jnp.tanh(w), "tanh"),
    "a gain for each output": (lambda w, x: x @ (w * jnp.arange(8.0)[None]), "mul"),
    "scaled, then bounded": (lambda w, x: x @ jnp.tanh(-2 * w[::-1]), "tanh"),
    "concatenate": (lambda w, x: x @ jnp.concatenate([w, jnp.ones((8, 2))], axis=1), "concatenate"),
    "stack": (lambda w, x: jnp.einsum("bi,sio->sbo", x, jnp.stack([w, jnp.ones((8, 8))])), "stack"),
    "padded by ones": (lambda w, x: x @ jnp.pad(w, ((0, 0), (0, 2)), constant_values=1.0), "pad"),
    "where": (lambda w, x: x @ jnp.where(jnp.tri(8) > 0, w, 0.0), "select_n"),
    "where on": (lambda w, x: x @ jnp.where(x[0, 0] > 0, w, 0.0), "select_n"),
    "custom_vjp of the weight": (lambda w, x: x @ clipped_gradient(w), "custom_vjp_call"),
    "custom_vjp of the product": (lambda w, x: own_matmul(x, w), "custom_vjp_call"),
    "custom_jvp": (lambda w, x: x @ halved_tangent(w), "custom_jvp_call"),
    "8 bits": (lambda w, x: x @ w.astype(jnp.float8_e4m3fn).astype(x.dtype), "convert_element_type"),
    "at[].set": (lambda w, x: x @ w.at[0].set(0.0), "scatter"),
    "put into a buffer": (lambda w, x: x @ jnp.zeros((8, 16)).at[:, 8:].set(w), "(dynamic_update_slice|scatter)"),
    "normalised columns": (lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)), "div"),
    "plus a change": (lambda w, x: x @ (w + jnp.ones((8, 2)) @ jnp.ones((2, 8))), "add"),
    "permuted columns": (lambda w, x: x @ jnp.sort(w, axis=1), "sort"),
    "jit": (lambda w, x: x @ jax.jit(jnp.tanh)(w), "tanh"),
    "checkpoint": (lambda w, x: jax.checkpoint(lambda w, x: x @ jnp.tanh(w))(w, x), "tanh"),
    "cond": (lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: 2 * w, w), "cond"),
    "loop": (looped, "scan"),
    "scan": (scanned, "tanh"),
    "grad inside": (lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ jnp.tanh(w))))(x), "tanh"),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ jnp.tanh(w))(x), "tanh"),
    "constant inputs": (lambda w, x: jnp.ones((5, 8)) @ jnp.tanh(w) + x, "tanh"),
    "Pallas kernel": (in_a_kernel, "pallas_call"),
    "shard_map": (resharded, "all_to_all"),
}


def two():
    return {name: {"kernel": normal(i, 8, 8)} for i, name in enumerate(("lost", "seen"))}


def after_seen(fn):
    """A program that multiplies by a weight as it is first."""
    return lambda params, x: fn(params["lost"]["kernel"], x @ params["seen"]["kernel"])


def weights_of(params):
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {dotted(path) for path, leaf in found if is_weight(leaf)}


WAYS = {
    "all-linear": lambda params, fn: pj.apply_lora(params, ALL, fn=fn, args=(X,)),
    "quantize": lambda params, fn: pj.quantize(params, fn=fn, args=(X,)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSES)
def test_a_weight_that_is_left_out_is_named_with_primitive_and_line(name, way):
    fn, primitive = LOSES[name]
    told = rf"leaves out weights, 1 in all: .*\. 'lost\.kernel' \({primitive} at \w+\.py:\d+\)\. Name"
    with pytest.warns(UserWarning, match=told) as caught:
        changed = WAYS[way](two(), after_seen(fn))
    assert len(caught) == 1 and caught[0].filename == __file__
    assert weights_of(changed) == {"seen.kernel"}


@pytest.mark.parametrize("way", WAYS)
def test_all_of_them_are_in_one_warning(way):
    params = {**two(), "more": [{"kernel": normal(2, 8, 8)}, {"kernel": normal(3, 8, 8)}]}
    fn = lambda p, x: x @ p["seen"]["kernel"] @ jnp.sin(p["more"][0]["kernel"]) @ jnp.tanh(p["more"][1]["kernel"])  # noqa: E731
    with pytest.warns(UserWarning) as caught:
        WAYS[way](params, fn)
    (message,) = (str(one.message) for one in caught)
    assert re.search(r"out weights, 2 in all: .*'more\.0\.kernel' \(sin at .*'more\.1\.kernel' \(tanh at ", message)
    assert "lost" not in message, "what the program does not use"


@pytest.mark.parametrize("way", WAYS)
def test_where_every_weight_is_left_out_the_error_says_why(way):
    told = r"leaves out every weight, 1 in all: .*'lost\.kernel' \(tanh at test_left_out.py:\d"
    with pytest.raises(ValueError, match=told):
        WAYS[way](two(), lambda params, x: x @ jnp.tanh(params["lost"]["kernel"]))


def test_what_is_meant_to_be_left_out_or_is_named_has_no_warning():
    """The suite turns warnings into errors."""
    fn = after_seen(lambda w, x: x @ jnp.tanh(w))
    for config in (ALL.replace(exclude_modules=["lost"]), ALL.replace(modules_to_save=["lost"])):
        assert "seen.kernel" in weights_of(pj.apply_lora(two(), config, fn=fn, args=(X,)))
    named = pj.apply_lora(two(), ALL.replace(target_modules=["lost", "seen"]), fn=fn, args=(X,))
    merged = {leaf.path: any(use.merged for use in leaf.uses) for leaf in pj.explain(fn, named, X).leaves}
    assert merged == {"lost.kernel": True, "seen.kernel": False}
    assert weights_of(pj.apply_lora(named, ALL, adapter_name="b", fn=fn, args=(X,))) == {"lost.kernel", "seen.kernel"}
    assert weights_of(pj.quantize(two(), target_modules=["lost"], fn=fn, args=(X,))) == {"lost.kernel"}
    assert weights_of(pj.apply_lora(two(), ALL)) == {"lost.kernel", "seen.kernel"}  # no program, nothing to know


@pytest.mark.parametrize("name", LOSES)
def test_explain_lists_what_was_not_followed_with_file_and_line(name):
    """Where the warning says it, once the weight is named and merged."""
    fn, primitive = LOSES[name]
    named = ALL.replace(target_modules=["lost", "seen"])
    adapted = pj.apply_lora(two(), named, fn=after_seen(fn), args=(X,))
    lost, seen = pj.explain(after_seen(fn), adapted, X).leaves
    merged = [use for use in lost.uses if use.merged]
    assert any(re.fullmatch(primitive, use.primitive) for use in merged), merged
    assert all(re.fullmatch(r"\w+\.py:\d+", use.where) for use in merged)
    assert not any(use.merged for use in seen.uses)


def normed(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def latents(params, x):
    """Learned queries, normalised, attend to the inputs: they are inputs of the products."""
    q = normed(params["aside"], jnp.ones((1, 8))) @ params["seen"]["kernel"]
    return jax.nn.softmax(q @ x.T) @ x


def gains_in_a_scan(params, x):
    """A norm's stacked gains, and a bias of heads."""

    def layer(h, gain):
        return normed(h, gain[None]) @ params["seen"]["kernel"], None

    return jax.lax.scan(layer, x, params["aside"])[0]


# Programs that use a leaf "aside" of some shape beside the products, and the shape.
ASIDE = {
    "gain for each column": (lambda p, x: (x * (1 + p["aside"])) @ p["seen"]["kernel"], (1, 8)),
    "gain for each column of a weight": (
        lambda p, x: x @ p["seen"]["kernel"] + x @ (jnp.ones((8, 8)) * jnp.exp(p["aside"])),
        (1, 8),
    ),
    "stacked gains": (gains_in_a_scan, (3, 8)),
    "stacked gains, unrolled": (lambda p, x: normed(x, -p["aside"][1][None]) @ p["seen"]["kernel"], (3, 8)),
    "position table": (lambda p, x: (x + 0.1 * p["aside"]) @ p["seen"]["kernel"], (5, 8)),
    "position lookup": (lambda p, x: (x + 2 * p["aside"][jnp.arange(5)]) @ p["seen"]["kernel"], (9, 8)),
    "lookup by inputs": (
        lambda p, x: jnp.take(-p["aside"], jnp.argmax(x, axis=1), axis=0) @ p["seen"]["kernel"],
        (9, 8),
    ),
    "bias of heads": (lambda p, x: (x @ p["seen"]["kernel"]).reshape(5, 2, 4) - p["aside"][None], (2, 4)),
    "bias of attention": (
        lambda p, x: jax.nn.softmax(x @ p["seen"]["kernel"] @ x.T - 2 * p["aside"]) @ x,
        (5, 5),
    ),
    "learned queries": (latents, (3, 8)),
    "running mean": (lambda p, x: (x - 0.9 * p["aside"]) @ p["seen"]["kernel"], (1, 8)),
    "cache": (lambda p, x: jax.lax.dynamic_update_slice(-p["aside"], x, (0, 0)) @ p["seen"]["kernel"], (9, 8)),
    "penalty": (lambda p, x: x @ p["seen"]["kernel"] + jnp.sum(p["aside"] ** 2), (8, 8)),
    "joined to the inputs": (lambda p, x: jnp.concatenate([p["aside"] * 2, x]) @ p["seen"]["kernel"], (2, 8)),
    "carried by a loop with the inputs": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: normed(h + x, p["aside"]) @ p["seen"]["kernel"], 0 * x),
        (1, 8),
    ),
    "returned": (lambda p, x: (x @ p["seen"]["kernel"], 2 * p["aside"]), (8, 8)),
}


@pytest.mark.parametrize("index", [3, slice(2, 3), "computed"])
def test_a_matrix_of_which_one_column_is_taken_is_not_left_out(index):
    def fn(params, x):
        i = jnp.argmax(x[0]) if index == "computed" else index
        return x @ params["lost"]["kernel"][:, i] + x @ params["turned"]["weight"][i].T

    params = {**two(), "turned": {"weight": normal(2, 8, 8)}}
    changed = pj.apply_lora(params, ALL, fn=fn, args=(X,))
    assert weights_of(changed) == {"lost.kernel", "turned.weight"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ASIDE)
def test_what_is_no_weight_of_a_product_has_no_warning(name, way):
    fn, shape = ASIDE[name]
    params = {"aside": normal(0, *shape), "seen": {"kernel": normal(1, 8, 8)}}
    assert weights_of(WAYS[way](params, fn)) == {"seen.kernel"}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.side_path])
def test_a_construct_with_a_side_path_has_no_warning(name):
    row = ROWS[name]
    params = {"layers": {"dense": {row.name: normal(0, *row.shape)}, "seen": {"kernel": normal(1, 8, 8)}}}
    fn = lambda p, x: (row.fn(p["layers"]["dense"][row.name], x), X @ p["layers"]["seen"]["kernel"])  # noqa: E731
    pj.quantize(params, fn=fn, args=(normal(2, *row.x),))
