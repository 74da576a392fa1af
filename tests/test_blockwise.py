"""Weights in blocks: values, products, gradients, lookups, loops, meshes and memory; every format from one table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import peft_jax as pj
from peft_jax.core.product import MATMUL
from peft_jax.quant import NF4, DoubleScale, Int4, Int8Groups, Quantizer, merge_quantized, nbytes
from peft_jax.train.mesh import make_mesh, place


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


# A format, and the largest error of a block relative to the block's largest element.
FORMATS = {
    "nf4": (Quantizer("nf4"), 0.16),
    "nf4, double": (Quantizer("nf4", double_quant=True), 0.2),
    "fp4": (Quantizer("fp4"), 0.18),
    "int4": (Quantizer("int4"), 0.5 / 7),
    "int4 by 32": (Quantizer("int4", 32), 0.5 / 7),
    "int8 by 64": (Quantizer("int8", 64), 0.5 / 127),
}
LAYOUTS = {
    "matrix": ((128, 6), pj.Layout()),
    "out first": ((6, 128), pj.Layout((), (1,), (0,))),
    "stack": ((3, 64, 6), pj.Layout((0,), (1,), (2,))),
    "stack inside": ((64, 3, 6), pj.Layout((1,), (0,), (2,))),
    "heads": ((64, 2, 3), pj.Layout((), (0,), (1, 2))),
    "heads contracted": ((2, 32, 6), pj.Layout((), (0, 1), (2,))),
    "short of a block": ((30, 6), pj.Layout()),  # nf4's and fp4's blocks run on, the others' are filled up
    "odd": ((3, 33, 5), pj.Layout((0,), (1,), (2,))),
}
every_format = pytest.mark.parametrize("name", FORMATS)


@every_format
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_values_are_near_in_every_layout(name, shape, layout):
    quantizer, most = FORMATS[name]
    array = normal(0, *shape) * 3
    weight = quantizer(array, layout)
    dense = weight.dense()
    assert weight.shape == shape and weight.dtype == array.dtype == dense.dtype and weight.ndim == len(shape)
    error = np.abs(np.asarray(layout.matrix(dense - array)))
    assert 0 < error.max() <= most * np.abs(array).max() * (1 + 1e-5)
    flat = layout.matrix(array).reshape(-1, *layout.sizes(shape))[-1]  # a layer by itself is rounded alike
    if not isinstance(getattr(weight, "scale", None), DoubleScale):
        np.testing.assert_array_equal(
            quantizer(flat, pj.Layout()).dense(), layout.matrix(dense).reshape(-1, *flat.shape)[-1]
        )
    again = weight.requantized(dense)
    assert jax.tree.structure(again) == jax.tree.structure(weight)
    assert weight.astype("bfloat16").dense().dtype == jnp.bfloat16


@every_format
@pytest.mark.parametrize("size", [128, 30])
def test_products_gradients_and_lookups_are_those_of_the_dense_array(name, size):
    weight = FORMATS[name][0](normal(0, size, 6), pj.Layout(lookup=True))
    x, dense = normal(1, 5, size), weight.dense()
    got, back = jax.vjp(jax.jit(weight.apply), x)
    close(got, x @ dense)
    cotangent = normal(2, 5, 6)
    close(back(cotangent)[0], cotangent @ dense.T)
    if size == 128:  # as on a TPU
        parts, back = jax.vjp(lambda x: weight.product_in_parts(x, MATMUL, x.dtype), x)
        close(parts, x @ dense)
        close(back(cotangent)[0], cotangent @ dense.T)
    half = weight.apply(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(np.asarray(half, np.float32), x @ dense, 2**-6)
    look_up = pj.adapt(lambda table, ids: jnp.take(table, ids, axis=0))
    ids = jnp.array([[0, size - 1], [3, 99999]])
    np.testing.assert_array_equal(look_up(weight, ids), jnp.take(dense, ids, axis=0))
    assert np.isnan(look_up(weight, ids)[1, 1]).all()


def test_on_a_tpu_a_layer_is_turned_and_not_the_stack():
    """Once for the product and once for its gradient: first the order of the stack, then rows in front of blocks."""
    weight = FORMATS["nf4"][0](normal(0, 128, 6), pj.Layout())
    run = jax.jit(jax.grad(lambda x: jnp.sum(weight.apply(x) ** 2)))
    text = run.trace(normal(1, 5, 128)).lower(lowering_platforms=("tpu",)).as_text()
    layouts = re.findall(r"@LayoutConstraint\(.*result_layouts = \[dense<(.*?)>", text)
    assert layouts == ["[2, 1, 0]", "[2, 0, 1]"] * 2


@every_format
@pytest.mark.parametrize("size", [64, 30])
def test_a_stack_is_scanned_and_vmapped(name, size):
    layout = pj.Layout((0,), (1,), (2,))
    weight = FORMATS[name][0](normal(0, 3, size, size), layout)
    x = normal(1, 4, size)

    def fn(stack, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    close(jax.jit(pj.adapt(fn))(weight, x), fn(weight.dense(), x))
    close(jax.vmap(pj.adapt(lambda w, x: x @ w), in_axes=(0, None))(weight, x), jnp.matmul(x[None], weight.dense()))


@every_format
def test_a_mesh_splits_blocks_and_scales(name):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    layout = pj.Layout((0,), (1,), (2,))
    weight = FORMATS[name][0](normal(0, 2, 512, 8), layout)
    spec = (None, "data", "tensor")
    placed = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), weight, weight.specs(spec))
    assert placed.entries(tuple(placed.array.sharding.spec)) == spec
    assert placed.array.size == 8 * placed.array.addressable_shards[0].data.size
    np.testing.assert_array_equal(jax.jit(lambda w: w.dense())(placed), weight.dense())
    leaf = pj.apply_lora({"layers": {"w": placed}}, pj.LoraConfig(r=2, target_modules=[".*w"][0]))["layers"]["w"]
    assert leaf.params["lora_A"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), 3)
    assert leaf.params["lora_B"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor")), 3)
    short = FORMATS[name][0](normal(0, 2, 30, 8), layout)  # one block, which cannot be split
    alone = place({"q_proj": {"kernel": short}}, make_mesh({"tensor": 8}))["q_proj"]["kernel"]
    np.testing.assert_array_equal(alone.dense(), short.dense())


@pytest.mark.parametrize(
    ("kind", "bytes_"),
    {"nf4": 32768 + 4096, "fp4": 32768 + 4096, "int4": 32768 + 2048, "int8": 65536 + 1024}.items(),
)
def test_bytes(kind, bytes_):
    weight = Quantizer(kind)(normal(0, 256, 256), pj.Layout())
    assert nbytes(weight) == bytes_
    model = {"w": {"kernel": weight}}
    assert pj.summary(pj.apply_lora(model, pj.LoraConfig(r=2, target_modules=["w"]))).splitlines()[-1].count("66,560")


def test_scales_of_scales_take_a_byte_each():
    plain, double = (Quantizer("nf4", double_quant=flag)(normal(0, 256, 256), pj.Layout()) for flag in (False, True))
    assert nbytes(plain) - nbytes(double) == 1024 * 3 - 4 * 4 - 4


LAYERS, DIM = 16, 256


@pytest.mark.usefixtures("optimizing_compiler")
@pytest.mark.parametrize("name", ["nf4", "int4", "int8 by 64"])
def test_no_dequantized_copy_is_kept_for_backward_and_the_check_can_fail(name):
    stack = FORMATS[name][0](normal(0, LAYERS, DIM, DIM), pj.Layout((0,), (1,), (2,)))
    a, b = jnp.zeros((LAYERS, DIM, 2)), jnp.zeros((LAYERS, 2, DIM))

    def memory(matmul):
        def loss(ab, stack, x):
            def layer(h, p):
                weight, a, b = p
                return h + matmul(weight, jnp.tanh(h)) + jnp.tanh(h) @ a @ b, None

            layers = stack.mapped(0, lambda array, axis: jnp.moveaxis(array, axis, 0), drop=True)
            return jnp.sum(jax.lax.scan(layer, x, (layers, *ab))[0])

        program = jax.jit(jax.grad(loss)).lower((a, b), stack, normal(1, 8, DIM)).compile()
        return program.memory_analysis().temp_size_in_bytes

    dense = LAYERS * DIM * DIM * 4
    assert memory(lambda weight, x: weight.apply(x)) < 0.3 * dense, "a dequantized copy of the stack is kept"
    assert memory(lambda weight, x: x @ weight.dense()) > dense, "the check would not see a copy that is kept"


@pytest.mark.parametrize("cls", [Int4, Int8Groups])
def test_integers_from_a_file_with_zero_points(cls):
    draw = np.random.default_rng(0)
    low, high = (0, 16) if cls is Int4 else (-128, 128)
    codes, zero = draw.integers(low, high, (2, 20, 6)), draw.integers(low, high, (2, 3, 6)).astype(np.int16)
    scale = draw.random((2, 3, 6)).astype(np.float32)
    layout = pj.Layout((0,), (1,), (2,))
    weight = cls.from_codes(jnp.array(codes), jnp.array(scale), "float32", layout, group_size=8, zero=jnp.array(zero))
    group = np.arange(20) // 8
    want = (codes - zero[:, group]).astype(np.float32) * scale[:, group]
    np.testing.assert_array_equal(weight.dense(), want)
    one = jax.tree.map(lambda array: array[0], weight).relaid(pj.Layout())
    close(one.apply(normal(1, 3, 20)), normal(1, 3, 20) @ want[0])
    np.testing.assert_array_equal(one.rows(jnp.array([0, 19])), want[0][[0, 19]])
    assert weight.specs((None, "data", None)).zero == P(None, "data", None)


def test_merging_into_a_quantized_base_reports_what_is_lost():
    base = pj.quantize({"a": {"kernel": normal(0, 64, 8)}, "b": {"kernel": normal(1, 64, 8)}}, kind="nf4")
    params = pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    merged, errors = merge_quantized(params)
    exact, rounded = pj.merge(params)["a"]["kernel"], merged["a"]["kernel"]
    assert isinstance(rounded, NF4) and errors.keys() == {"a.kernel"}
    assert merged["b"]["kernel"].packed is base["b"]["kernel"].packed
    np.testing.assert_array_equal(rounded.dense(), NF4.of(exact, pj.Layout()).dense())
    np.testing.assert_allclose(
        errors["a.kernel"], np.linalg.norm(rounded.dense() - exact) / np.linalg.norm(exact), rtol=1e-5
    )
    assert errors["a.kernel"] > 0.01


TREE = {"a": {"kernel": np.ones((64, 8), np.float32)}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nf5"}, "kind='nf5' is not supported. Write one of nf4, fp4, int4, int8"),
        ({"kind": "nf4", "group_size": 48}, "group_size of 32, 64, .* got 48"),
        ({"kind": "int4", "group_size": 3}, "even number of inputs, got 3"),
        ({"kind": "int4", "double_quant": True}, "an option of nf4 and fp4, not of int4"),
        ({"bits": 8, "kind": "nf4"}, "bits=8 and kind='nf4'. Write kind= alone"),
        ({"bits": 4}, "bits=4.*kind='nf4', 'fp4' or 'int4'"),
    ],
)
def test_formats_that_are_not_there_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pj.quantize(TREE, **options)


def test_a_leaf_in_another_format_is_named():
    tree = pj.quantize(TREE, kind="nf4")
    assert pj.quantize(tree, kind="nf4")["a"]["kernel"] is tree["a"]["kernel"]
    for other, message in (
        ({"kind": "int8"}, "nf4 by 64 already, and was to be int8"),
        (
            {"kind": "nf4", "group_size": 128},
            "nf4 by 64 already, and was to be nf4 by 128",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pj.quantize(tree, **other)
    with pytest.raises(ValueError, match="found NaN or infinity"):
        pj.quantize({"a": {"kernel": jnp.full((64, 8), jnp.nan)}}, kind="int4")
