"""Int8 leaves: half a step, the right product, and no dequantized copy kept for backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.quant import Int8, nbytes, quantize_array


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


LAYOUTS = {
    "matrix": ((8, 6), pj.Layout()),
    "out first": ((6, 8), pj.Layout((), (1,), (0,))),
    "stack": ((3, 8, 6), pj.Layout((0,), (1,), (2,))),
    "heads": ((8, 2, 3), pj.Layout((), (0,), (1, 2))),
    "heads contracted": ((2, 4, 6), pj.Layout((), (0, 1), (2,))),
}


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_is_at_most_half_a_step(shape, layout, dtype):
    array = (normal(0, *shape) * 3).astype(dtype)
    weight = quantize_array(array, layout)
    steps = layout.unmatrix(jnp.broadcast_to(weight.scale[..., None, :], layout.matrix(array).shape), shape)
    exact = np.asarray(weight.q, np.float32) * np.asarray(steps)
    error = np.abs(exact - np.asarray(array, np.float32))
    assert np.all(error <= np.asarray(steps) * (0.5 + 1e-5)) and error.max() > 0
    assert np.abs(np.asarray(weight.q)).max() == 127 and weight.q.dtype == jnp.int8
    assert weight.dense().dtype == array.dtype and weight.dense().shape == shape
    np.testing.assert_array_equal(weight.dense(), exact.astype(array.dtype))


def test_channels_of_zeros_stay_zero():
    weight = quantize_array(jnp.zeros((4, 3)).at[:, 0].set(2.0), pj.Layout())
    np.testing.assert_array_equal(weight.dense(), jnp.zeros((4, 3)).at[:, 0].set(2.0))
    assert weight.scale.tolist()[1:] == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_and_its_gradients_are_those_of_the_dequantized_weight(dtype):
    weight = quantize_array(normal(0, 64, 48).astype(dtype), pj.Layout())
    x = normal(1, 5, 64).astype(dtype)
    dense = weight.q.astype(jnp.float32) * weight.scale[None]

    def plain(x):
        return x.astype(jnp.float32) @ dense

    # bfloat16: the result is rounded to 8 bits of mantissa once, after scaling.
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    out = weight.apply(x)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), plain(x), rtol=tolerance, atol=tolerance * 10)
    cotangent = normal(2, 5, 48).astype(dtype)
    (got,) = jax.vjp(weight.apply, x)[1](cotangent)
    want = cotangent.astype(jnp.float32) @ dense.T
    np.testing.assert_allclose(
        np.asarray(got, np.float32), want, rtol=tolerance * 4, atol=tolerance * np.abs(want).max() * 4
    )
    tangent = jax.jvp(weight.apply, (x,), (x,))[1]
    np.testing.assert_allclose(np.asarray(tangent, np.float32), np.asarray(out, np.float32), rtol=1e-2, atol=0.1)


def test_rows_are_looked_up_and_missing_rows_are_nan():
    weight = quantize_array(normal(0, 8, 6), pj.Layout(lookup=True))
    fn = pj.adapt(lambda table, ids: jnp.take(table, ids, axis=0))
    ids = jnp.array([[0, 7], [3, 99]])
    np.testing.assert_array_equal(fn(weight, ids), jnp.take(weight.dense(), ids, axis=0))
    assert np.isnan(fn(weight, ids)[1, 1]).all()


LAYERS, DIM, TOKENS = 16, 256, 8


def backward_memory(matmul):
    """The compiler's temporary bytes for the gradient of a scanned stack, without rematerialisation."""
    weights = quantize_array(normal(0, LAYERS, DIM, DIM), pj.Layout((0,), (1,), (2,)))
    a, b = jnp.zeros((LAYERS, DIM, 2)), jnp.zeros((LAYERS, 2, DIM))

    def loss(ab, weights, x):
        def layer(h, p):
            weight, a, b = p
            return h + matmul(weight, jnp.tanh(h)) + jnp.tanh(h) @ a @ b, None

        layers = weights.mapped(0, lambda array, axis: jnp.moveaxis(array, axis, 0), drop=True)
        return jnp.sum(jax.lax.scan(layer, x, (layers, *ab))[0])

    program = jax.jit(jax.grad(loss)).lower((a, b), weights, normal(1, TOKENS, DIM)).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimizing_compiler")
def test_no_dequantized_copy_is_kept_for_backward_and_the_check_can_fail():
    dense_stack = LAYERS * DIM * DIM * 4
    ours = backward_memory(lambda weight, x: weight.apply(x))
    plain = backward_memory(lambda weight, x: (x @ weight.q.astype(x.dtype)) * weight.scale[None])
    assert ours < 0.3 * dense_stack, "a dequantized copy of the stack is kept"
    assert plain > dense_stack, "the check would not see a copy that is kept"


def test_quantize_takes_matmul_weights_and_leaves_the_rest():
    tree = {"a": {"kernel": normal(0, 8, 6), "bias": jnp.ones(6)}, "b": {"embedding": normal(1, 8, 6)}}
    out = pj.quantize(tree)
    assert isinstance(out["a"]["kernel"], Int8)
    assert out["a"]["bias"] is tree["a"]["bias"] and out["b"]["embedding"] is tree["b"]["embedding"]
    assert isinstance(pj.quantize(tree, target_modules=["b"])["b"]["embedding"], Int8)
    assert pj.quantize(out)["a"]["kernel"] is out["a"]["kernel"]
    np.testing.assert_array_equal(pj.merge(out)["a"]["kernel"], out["a"]["kernel"].dense())
    with pytest.raises(ValueError, match="Target module 'c' hits none"):
        pj.quantize(tree, target_modules=["c"])
    with pytest.raises(ValueError, match="bits=4"):
        pj.quantize(tree, bits=4)


def test_quantize_goes_under_adapters():
    params = pj.apply_lora(
        {"a": {"kernel": normal(0, 8, 6)}}, pj.LoraConfig(target_modules=["a"], init_lora_weights=False)
    )
    leaf = pj.quantize(params)["a"]["kernel"]
    assert isinstance(leaf.base, Int8) and leaf.params is params["a"]["kernel"].params


def test_bytes_of_a_large_matrix_are_a_quarter():
    weight = quantize_array(normal(0, 512, 256), pj.Layout())
    assert nbytes(weight) == 512 * 256 + 256 * 4
