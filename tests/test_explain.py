"""explain: axes, uses and what merges are told before any training; and leaves used without adapt."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import ROWS, own_matmul

import peft_jax as pj
from peft_jax.core import weight as weights


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def adapted(shape=(8, 8), layout=None, name="kernel", **options):
    config = pj.LoraConfig(r=3, target_modules=".*dense.*", init_lora_weights=False)
    params = {"layers": {"dense": {name: normal(0, *shape)}}}
    return pj.apply_lora(params, config, layout={".*": layout} if layout else None, **options)


@pytest.mark.parametrize("name", ROWS)
def test_says_merged_exactly_where_there_is_no_side_path(name):
    row = ROWS[name]
    params = adapted(row.shape, row.layout, row.name)
    fn = lambda params, x: row.fn(params["layers"]["dense"][row.name], x)  # noqa: E731
    (leaf,) = pj.explain(fn, params, jax.ShapeDtypeStruct(row.x, jnp.float32)).leaves
    assert leaf.uses, "a use was not seen"
    assert any(use.merged for use in leaf.uses) != row.side_path
    assert (leaf.path, leaf.shape) == (f"layers.dense.{row.name}", row.shape)


def test_counts_each_use_and_names_its_place():
    def fn(params, x):
        w = params["layers"]["dense"]["kernel"]
        x = jax.jit(jnp.matmul)(jax.jit(jnp.matmul)(x, w), w)
        return own_matmul(x, w), w

    (leaf,) = pj.explain(fn, adapted(), normal(1, 5, 8)).leaves
    assert [(use.primitive, use.merged) for use in leaf.uses] == [
        ("dot_general", False),
        ("dot_general", False),
        ("custom_vjp_call", True),
        ("output", True),
    ]
    assert leaf.uses[2].where.startswith(("test_explain.py:", "constructs.py:"))
    assert pj.explain(pj.adapt(jax.jit(fn)), adapted(), normal(1, 5, 8)).leaves == (leaf,)


def test_reports_what_is_never_used_and_where_the_axes_come_from():
    params = {"a": {"kernel": normal(0, 8, 4)}, "b": {"kernel": normal(1, 2, 8, 4)}, "c": {"weight": normal(2, 4, 8)}}
    fn = lambda params, x: jnp.einsum("bi,sio->bso", x, params["b"]["kernel"])  # noqa: E731
    config = pj.LoraConfig(r=2, target_modules=["a", "b", "c"])
    params = pj.apply_lora(
        params, config, fn=fn, args=(normal(3, 5, 8),), layout={"c.weight": pj.Layout((), (0,), (1,))}
    )
    told = pj.explain(fn, params, normal(3, 5, 8))
    assert told.unused == ("a.kernel", "c.weight")
    sources = {leaf.path: leaf.layout.source for leaf in told.leaves}
    assert sources == {
        "a.kernel": "by convention for 'kernel'",
        "b.kernel": "read off the program",
        "c.weight": "told by layout=",
    }
    assert "in (1,), out (0, 2) (read off the program)" in str(told) and "never used by this function" in str(told)


def test_tells_of_quantized_bases_nested_adapters_and_copies_trained_whole():
    params = pj.quantize({"dense": {"kernel": normal(0, 8, 8)}, "head": {"kernel": normal(1, 8, 4)}})
    config = pj.LoraConfig(r=2, target_modules=["dense"], modules_to_save=["head"])
    params = pj.apply_lora(pj.apply_lora(params, config, adapter_name="a"), config, adapter_name="b")
    params = pj.set_adapter(params, "b")
    fn = lambda params, x: x @ params["dense"]["kernel"] @ params["head"]["kernel"]  # noqa: E731
    told = pj.explain(fn, params, normal(2, 5, 8))
    assert told.leaves[0].kinds == ("b: LORA", "a: LORA (not active)", "int8")
    assert told.leaves[1].kinds == ("b: modules_to_save", "a: modules_to_save (not active)", "int8")


MERGES_BY_ITSELF = {
    "x @ w": lambda w, x: x @ w,
    "w @ x": lambda w, x: w @ x.T,
    "jnp.dot": lambda w, x: jnp.dot(x, w),
    "einsum": lambda w, x: jnp.einsum("bi,io->bo", x, w),
    "jnp.asarray": lambda w, x: jnp.asarray(w),
    "elementwise": lambda w, x: jnp.multiply(w, 2.0),
    "w * 2": lambda w, x: jnp.ones((8, 8)) * w,
}


@pytest.mark.parametrize("bits", [None, 8], ids=["float", "int8"])
@pytest.mark.parametrize("name", MERGES_BY_ITSELF)
def test_a_leaf_used_without_adapt_is_merged_with_one_warning(name, bits):
    params = adapted()
    leaf = pj.quantize(params, bits)["layers"]["dense"]["kernel"] if bits else params["layers"]["dense"]["kernel"]
    fn, x = MERGES_BY_ITSELF[name], normal(1, 5, 8)
    weights._warn_of_merging.cache_clear()
    with pytest.warns(UserWarning, match="outside of pj.adapt, so it is merged"):
        got = fn(leaf, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn(leaf, x)  # the second time there is no warning
    np.testing.assert_allclose(got, fn(leaf.dense(), x), rtol=0, atol=1e-5)


def test_what_an_array_has_and_a_leaf_has_not_says_what_to_write():
    leaf = adapted()["layers"]["dense"]["kernel"]
    with pytest.raises(AttributeError, match=r"has no 'T'.*pj.adapt\(fn\).*pj.merge\(params\)"):
        _ = leaf.T
    with pytest.raises((TypeError, ValueError)):  # lax takes arrays alone, as pj.adapt's documentation says
        jax.lax.sin(leaf)
