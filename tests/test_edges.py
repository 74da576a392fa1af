"""Shapes and names at the edge: axes of length 1, dead code, ensembles; a stacked leaf's own path names its layers."""

import jax
import jax.numpy as jnp
import pytest
from test_constructs import close

import peft_jax as pj
from peft_jax.core.partition import count_parameters

X = jax.random.normal(jax.random.key(9), (2, 8))
IMAGE = jax.random.normal(jax.random.key(8), (2, 8, 5, 5))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def scan(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["blocks"]["mlp"])[0]


def top(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layer"])[0]


def with_dead_code(params, x):
    jnp.take(params["blocks"]["mlp"], 0, axis=0)
    return scan(params, x)


def pointwise(numbers, index):
    """A matrix as the kernel of a convolution of one tap."""
    return lambda p, x: jax.lax.conv_general_dilated(
        x, p["a"]["weight"][index], (1, 1), "SAME", dimension_numbers=numbers
    )


def one_matrix(module, name):
    return lambda params, x: x @ params[module][name]


def unrolled(params, x):
    return x @ params["encoderblock_0"]["q"]["kernel"] @ params["encoderblock_1"]["q"]["kernel"]


STACK, ONE = {"blocks": {"mlp": normal(0, 3, 8, 8)}}, {"a": {"weight": normal(1, 8, 8)}}
FLAX = {f"encoderblock_{i}": {"q": {"kernel": normal(i, 8, 8)}} for i in range(2)}
WEIGHTS = {name: {"q_proj": {name: normal(3, 8, 8)}} for name in ("w", "weights", "embeddings", "b")}
LAST, FIRST = (slice(None), slice(None), None, None), (None, None)

# name: (function, parameters, fields of the config, number of adapted layers)
CASES = {
    "w[None]": (lambda p, x: jnp.einsum("bi,soi->bo", x, p["a"]["weight"][None]), ONE, {}, 1),
    "w[None, None]": (lambda p, x: jnp.einsum("bi,stoi->bo", x, p["a"]["weight"][None, None]), ONE, {}, 1),
    "conv, w[:, :, None, None]": (pointwise(("NCHW", "OIHW", "NCHW"), LAST), ONE, {}, 1),
    "conv, w[None, None]": (pointwise(("NCHW", "HWIO", "NCHW"), FIRST), ONE, {}, 1),
    "dead code beside a scan": (with_dead_code, STACK, {}, 3),
    "own path": (scan, STACK, {"target_modules": ["blocks.mlp"]}, 3),
    "own path under params": (
        lambda p, x: scan(p["params"], x),
        {"params": STACK},
        {"target_modules": ["params.blocks.mlp"]},
        3,
    ),
    "own path at the top": (top, {"layer": STACK["blocks"]["mlp"]}, {"target_modules": ["layer"]}, 3),
    "own path excluded": (
        lambda p, x: scan(p, x) @ p["o"]["kernel"],
        {**STACK, "o": {"kernel": normal(2, 8, 8)}},
        {"exclude_modules": ["blocks.mlp"]},
        1,
    ),
    "own path in rank_pattern": (scan, STACK, {"target_modules": ["mlp"], "rank_pattern": {"blocks.mlp": 1}}, 3),
    "own path in alpha_pattern": (scan, STACK, {"target_modules": ["mlp"], "alpha_pattern": {"blocks.mlp": 3}}, 3),
    "own path as a regex": (scan, STACK, {"target_modules": r"blocks\.mlp"}, 3),
    "own path beside a module in a regex": (
        lambda p, x: scan(p, x) @ p["o"]["kernel"],
        {**STACK, "o": {"kernel": normal(2, 8, 8)}},
        {"target_modules": r"(blocks\.mlp|o)"},
        4,
    ),
    "own path at the top as a regex": (top, {"layer": STACK["blocks"]["mlp"]}, {"target_modules": "layer"}, 3),
    "layers of blocks": (scan, STACK, {"target_modules": ["mlp"], "layers_to_transform": [1, 2]}, 2),
    "layers at the top": (
        top,
        {"layer": STACK["blocks"]["mlp"]},
        {"target_modules": ["layer"], "layers_to_transform": [0]},
        1,
    ),
    "layers of Flax": (unrolled, FLAX, {"target_modules": ["q"], "layers_to_transform": [1]}, 1),
    "layers of Flax, by layers_pattern": (
        unrolled,
        FLAX,
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "encoderblock"},
        1,
    ),
    "q_proj.w by q_proj": (one_matrix("q_proj", "w"), WEIGHTS["w"], {"target_modules": ["q_proj"]}, 1),
    "q_proj.w by a regex": (one_matrix("q_proj", "w"), WEIGHTS["w"], {"target_modules": ".*q_proj"}, 1),
    "q_proj.weights": (one_matrix("q_proj", "weights"), WEIGHTS["weights"], {"target_modules": ["q_proj"]}, 1),
    "q_proj.embeddings": (one_matrix("q_proj", "embeddings"), WEIGHTS["embeddings"], {}, 1),
    "a matrix called b": (one_matrix("q_proj", "b"), WEIGHTS["b"], {"target_modules": ["q_proj"]}, 1),
    "a matrix called b, all-linear": (one_matrix("q_proj", "b"), WEIGHTS["b"], {}, 1),
    "a path with slashes": (
        one_matrix("net/~/linear_1", "w"),
        {"net/~/linear_1": {"w": normal(3, 8, 8), "b": normal(5, 8)}},
        {"target_modules": ["linear_1"]},
        1,
    ),
    "layers of a path with slashes": (
        lambda p, x: x @ p["net/~/block_0"]["w"] @ p["net/~/block_1"]["w"],
        {f"net/~/block_{i}": {"w": normal(i, 8, 8)} for i in range(2)},
        {"target_modules": ["w"], "layers_to_transform": [1]},
        1,
    ),
    "bare experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["down"], jnp.array([1, 0, 1])),
        {"down": STACK["blocks"]["mlp"]},
        {"target_modules": ["down"]},
        3,
    ),
    "kernel at the top": (lambda p, x: x @ p["kernel"], {"kernel": normal(4, 8, 8)}, {"target_modules": ["kernel"]}, 1),
    "embedding at the top": (
        lambda p, x: p["embedding"][jnp.argmax(x, axis=1)],
        {"embedding": normal(4, 8, 8)},
        {"target_modules": ["embedding"]},
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attaches_and_equals_merging(name):
    fn, params, fields, layers = CASES[name]
    x = IMAGE if name.startswith("conv") else X
    config = pj.LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields})
    adapted = pj.apply_lora(params, config, fn=fn, args=(x,))
    close(pj.adapt(fn)(adapted, x), fn(pj.merge(adapted), x), 1e-5)
    told = pj.explain(fn, adapted, x)
    assert not any(use.merged for leaf in told.leaves for use in leaf.uses) and not told.unused
    rank = 1 if "rank_pattern" in fields else 2
    assert count_parameters(adapted)[0] == layers * rank * 16


@pytest.mark.parametrize("targets", [["blocks.mlp"], r"blocks\.mlp"])
def test_quantize_takes_the_own_path_of_a_stack(targets):
    assert pj.quantize(STACK, target_modules=targets, fn=scan, args=(X,))["blocks"]["mlp"].q.shape == (3, 8, 8)


@pytest.mark.parametrize("name", CASES)
def test_what_explain_and_summary_print_is_a_target(name):
    fn, params, fields, layers = CASES[name]
    x = IMAGE if name.startswith("conv") else X
    adapted = pj.apply_lora(params, pj.LoraConfig(**{"target_modules": "all-linear", **fields}), fn=fn, args=(x,))
    printed = [leaf.path for leaf in pj.explain(fn, adapted, x).leaves]
    assert all(path in str(pj.summary(adapted)) for path in printed)
    again = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=printed), fn=fn, args=(x,))
    assert [leaf.path for leaf in pj.explain(fn, again, x).leaves] == printed


def test_complex_leaves_are_refused_by_name():
    complex_leaf = {"a": {"kernel": jnp.ones((8, 8), jnp.complex64)}}
    fn = lambda p, x: (x.astype(jnp.complex64) @ p["a"]["kernel"]).real  # noqa: E731
    for targets in ("all-linear", ["a"]):
        with pytest.raises(ValueError, match=r"'a.kernel' is complex64.*real numbers"):
            pj.apply_lora(complex_leaf, pj.LoraConfig(target_modules=targets), fn=fn, args=(X,))


def test_an_adapted_leaf_that_is_indexed_says_what_to_write():
    adapted = pj.apply_lora(ONE, pj.LoraConfig(target_modules=["a"]))
    with pytest.raises(TypeError, match=r"cannot be indexed.*pj.adapt\(fn\).*pj.merge\(params\)"):
        adapted["a"]["weight"][...]


def depthwise(params, x):
    def conv(w, x, groups):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    return conv(params["point"]["kernel"], conv(params["depth"]["kernel"], x, 4), 1)


def test_all_linear_leaves_out_depthwise_kernels_that_cannot_share_the_rank_and_says_so():
    params = {"depth": {"kernel": normal(0, 3, 3, 1, 4)}, "point": {"kernel": normal(1, 1, 1, 4, 6)}}
    image, config = normal(2, 1, 5, 5, 4), pj.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with pytest.warns(UserWarning, match=r"groups do not divide the rank: 'depth\.kernel'\. Name them"):
        adapted = pj.apply_lora(params, config, fn=depthwise, args=(image,))
    assert isinstance(adapted["depth"]["kernel"], jax.Array)
    close(pj.adapt(depthwise)(adapted, image), depthwise(pj.merge(adapted), image), 1e-5)
    pj.apply_lora(params, config.replace(exclude_modules=["depth"]), fn=depthwise, args=(image,))  # without a warning
    for changed in (config.replace(r=4), config.replace(rank_pattern={"depth": 8})):
        both = pj.apply_lora(params, changed, fn=depthwise, args=(image,))
        assert not any(isinstance(leaf["kernel"], jax.Array) for leaf in both.values())
    with pytest.raises(ValueError, match=r"all-linear' leaves out convolutions.*'depth\.kernel'"):
        alone = lambda params, x: depthwise({**params, "point": {"kernel": jnp.ones((1, 1, 4, 6))}}, x)  # noqa: E731
        pj.apply_lora({"depth": params["depth"]}, config, fn=alone, args=(image,))


def test_adapters_attached_under_vmap_are_merged_outside_of_it():
    def net(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    members = {"a": {"kernel": normal(0, 3, 8, 6)}, "b": {"kernel": normal(1, 3, 6, 4)}}
    config = pj.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    for kind in (None, "int8"):
        base = (
            members
            if kind is None
            else jax.vmap(lambda p, kind=kind: pj.quantize(p, kind=kind, fn=net, args=(X,)))(members)
        )
        adapted = jax.vmap(lambda member: pj.apply_lora(member, config, fn=net, args=(X,)))(base)
        merged = pj.merge(adapted)
        assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, members)
        got = jax.vmap(pj.adapt(net), in_axes=(0, None))(adapted, X)
        close(got, jax.vmap(net, in_axes=(0, None))(merged, X), 1e-5)
        assert not jnp.allclose(got, jax.vmap(net, in_axes=(0, None))(members, X))
