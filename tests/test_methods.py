"""The contract that every method keeps; the methods are those of cases.py."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS, tiny_configs

import peft_jax as pj
from peft_jax.core.precision import in_base_dtype, with_compute_dtype
from peft_jax.core.product import MATMUL, Lookup
from peft_jax.core.weight import Dense

CASES = tiny_configs()
ROUNDS = [CASES[name] for method in METHODS.values() for name in method.rounds]
every_method = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
# Of those that have no merged matrix, test_each_method.py has the contract.
MERGED = [name for name, method in METHODS.items() if method.changes_matrix and method.merges]
CHANGING = [name for name, config in CASES.items() if config.peft_type in MERGED]
changes_matrix = pytest.mark.parametrize("config", [CASES[name] for name in CHANGING], ids=CHANGING)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def perturbed(params):
    return {name: array + 0.3 * normal(i, *array.shape) for i, (name, array) in enumerate(params.items())}


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def start(config, *, layers=None, shape=(12, 8)):
    """A tree with one adapted kernel, unlike the fresh one in every array."""
    stack = () if layers is None else (layers,)
    kernel = normal(7, *stack, *shape)
    layout = pj.Layout((0,), (1,), (2,)) if stack else pj.Layout()
    params = pj.apply_adapter({"layers": {"dense": {"kernel": kernel}}}, config, layout={".*kernel": layout})
    leaf = params["layers"]["dense"]["kernel"]
    return kernel, dataclasses.replace(leaf, params=perturbed(leaf.params))


@changes_matrix
def test_a_fresh_adapter_changes_nothing(config):
    kernel = normal(0, 12, 8)
    params = pj.apply_adapter({"dense": {"kernel": kernel}}, config)
    merged = pj.merge(params)["dense"]["kernel"]
    if config in ROUNDS:
        close(merged, kernel, 1e-6)
    else:
        np.testing.assert_array_equal(merged, kernel)


DRAWN = {"a bias of LoRA": pj.LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["dense"])}
for name in ("FROD", "ADAMSS", "LOHA", "LOKR", "HIRA"):
    DRAWN[f"{name} at random"] = CASES[name].replace(init_weights=False)


@pytest.mark.parametrize("config", [*CASES.values(), *DRAWN.values()], ids=[*CASES, *DRAWN])
def test_a_second_leaf_of_the_same_shape_compiles_nothing(config):
    compiled = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more["fun_name"])

    tree = {"layers": {"dense": {"kernel": normal(0, 2, 12, 8)}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    pj.apply_adapter(tree, config, layout=layout)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        pj.apply_adapter(tree, config, layout=layout)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@changes_matrix
def test_products_and_lookups_equal_merging_first(config):
    kernel, leaf = start(config)
    x, merged = normal(1, 5, 12), leaf.dense()
    close(leaf.method.apply(leaf.params, leaf.state, Dense(kernel, leaf.layout), x, MATMUL), x @ merged)
    ids = jnp.array([3, 0, 3])
    close(leaf.apply(ids, Lookup()), merged[ids])
    assert not np.allclose(merged, kernel), "the perturbed adapter had no effect"


@changes_matrix
def test_gradients_equal_those_of_merging_and_reach_every_array(config):
    kernel, leaf = start(config)
    x = normal(1, 5, 12)

    def loss(params, use):
        weight = dataclasses.replace(leaf, params=params)
        return jnp.sum(jnp.sin(weight.apply(x) if use == "apply" else x @ weight.dense()))

    got = jax.jit(jax.grad(loss), static_argnums=1)(leaf.params, "apply")
    want = jax.grad(loss)(leaf.params, "merge")
    for name, gradient in got.items():
        close(gradient, want[name])
        assert np.abs(gradient).max() > 1e-3, f"{name} has no gradient"


@changes_matrix
def test_stacked_equals_looped(config):
    kernel, leaf = start(config, layers=3)
    for i in range(3):
        one = leaf.mapped(0, lambda array, axis, i=i: jnp.take(array, i, axis), drop=True)
        close(leaf.dense()[i], one.dense())
        assert one.layout == pj.Layout(index_after=())


@every_method
def test_config_survives_json(config):
    again = pj.PeftConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert again.structure() == config.structure()


@every_method
def test_the_second_step_and_another_adapter_compile_nothing(config):
    trees = [pj.apply_adapter({"dense": {"kernel": normal(0, 12, 8)}}, config, adapter_name=name) for name in "ab"]
    step = jax.jit(pj.adapt(lambda params, x: x @ params["dense"]["kernel"]))
    for tree in (*trees, trees[0]):
        step(tree, normal(1, 2, 12))
    assert step._cache_size() == 1


def is_plain(array):
    """Whether an array is of one number, as some methods start, or the unit matrix."""
    return np.ptp(array) == 0 or (array.ndim == 2 and np.array_equal(array, np.eye(*array.shape)))


@every_method
def test_adding_a_target_changes_no_other_adapter(config):
    tree = {"dense": {"kernel": normal(0, 12, 8)}, "other": {"kernel": normal(1, 12, 8)}}
    both = pj.apply_adapter(tree, dataclasses.replace(config, target_modules=["dense", "other"]))
    one = pj.apply_adapter(tree, config)
    for name, array in one["dense"]["kernel"].params.items():
        if not (name in config.carried and config.counts_modules):  # what all leaves share may be of another number
            np.testing.assert_array_equal(array, both["dense"]["kernel"].params[name])
    other = both["other"]["kernel"].params  # without what all leaves share, which the first has
    pairs = [(array, other[name]) for name, array in both["dense"]["kernel"].params.items() if name in other]
    shared = set(both["dense"]["kernel"].params) - set(other)
    assert shared <= set(config.carried)
    drawn = [not np.array_equal(a, b) for a, b in pairs if not is_plain(a)]
    assert any(drawn) or not drawn


@changes_matrix
@pytest.mark.parametrize("kind", ["int8", "nf4", "int4"])
def test_works_on_a_quantized_base(config, kind):
    tree = pj.quantize({"dense": {"kernel": normal(0, 12, 8)}}, kind=kind)
    leaf = pj.apply_adapter(tree, config)["dense"]["kernel"]
    leaf = dataclasses.replace(leaf, params=perturbed(leaf.params))
    x = normal(1, 5, 12)
    close(leaf.apply(x), x @ leaf.dense())
    assert leaf.base.array.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)


@changes_matrix
def test_an_adapter_may_have_its_bases_precision(config):
    kernel = normal(0, 12, 8).astype(jnp.bfloat16)
    full = pj.apply_adapter({"dense": {"kernel": kernel}}, config)["dense"]["kernel"]
    assert {array.dtype for array in full.params.values()} == {jnp.dtype("float32")}
    full = dataclasses.replace(full, params={**full.params, **perturbed(full.params)})
    half = in_base_dtype({"dense": {"kernel": full}})["dense"]["kernel"]
    assert {array.dtype for array in half.params.values()} == {kernel.dtype}
    x = normal(1, 5, 12).astype(kernel.dtype)
    for got, want in ((half.apply(x), full.apply(x)), (half.dense(), full.dense())):
        assert got.dtype == want.dtype == kernel.dtype
        got, want = (np.asarray(y, np.float32) for y in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=2**-5 * np.abs(want).max())  # bfloat16 has 8 digits
    gradient = jax.grad(lambda params: jnp.sum(dataclasses.replace(half, params=params).apply(x)))(half.params)
    assert all(np.isfinite(np.asarray(array, np.float32)).all() for array in gradient.values())
    if full.tag.role is not None:
        with pytest.raises(ValueError, match="adapter 'default' trains whole arrays alone. Leave it out."):
            with_compute_dtype({"dense": {"kernel": full}}, "bfloat16")
        return
    computed = with_compute_dtype({"dense": {"kernel": full}}, "bfloat16")["dense"]["kernel"]
    assert {array.dtype for array in computed.params.values()} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(computed.apply(x), half.apply(x))  # the products alone are of that type
    np.testing.assert_array_equal(computed.dense(), full.dense())


def test_arrays_that_all_leaves_train_are_of_the_type_of_the_products_too():
    """Those of a stacked leaf, and of each leaf but one, are in another leaf."""
    tree = {"q": {"kernel": normal(0, 12, 8)}, "layers": {"v": {"kernel": normal(1, 2, 12, 8)}}}
    run = pj.adapt(lambda params, x: (x @ params["q"]["kernel"], x @ params["layers"]["v"]["kernel"][1]))

    def types_of_products(params):
        text = jax.jit(run).lower(params, normal(2, 5, 12)).as_text()
        return re.findall(r"stablehlo.dot_general .*tensor<[\dx]*x(\w+)>$", text, re.M)

    for name in ("UNILORA", "TINYLORA", "VBLORA"):
        config = CASES[name].replace(target_modules=["q", "v"])
        params = pj.apply_adapter(tree, config, layout={"layers.*": pj.Layout((0,), (1,), (2,))})
        of_base = types_of_products(tree)
        assert set(types_of_products(params)) == set(of_base) == {"f32"}
        found = types_of_products(with_compute_dtype(params, "bfloat16"))
        assert found.count("f32") == len(of_base) and found.count("bf16") >= 4, name
