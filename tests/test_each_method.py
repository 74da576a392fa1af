"""Each method's own property: what its paper promises of the adapted layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def perturbed(params, scale=0.3):
    """The tree with other numbers in every trained array."""
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [leaf + scale * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return pj.combine(jax.tree.unflatten(treedef, leaves), frozen)


def layer(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


@pytest.fixture
def dense():
    return {"dense": {"kernel": normal(1, 6, 4), "bias": normal(2, 4)}}


@pytest.mark.parametrize("feedforward", [[], ["dense"]], ids=["outputs", "inputs"])
def test_ia3_scales_outputs_with_the_bias_or_inputs(feedforward, dense):
    config = pj.IA3Config(target_modules=["dense"], feedforward_modules=feedforward)
    params = perturbed(pj.apply_adapter(dense, config))
    ((role, vector),) = params["dense"]["kernel"].params.items()
    x = normal(3, 5, 6)
    want = layer(dense, x * vector[None]) if feedforward else layer(dense, x) * vector[None]
    close(pj.adapt(layer)(params, x), want)
    close(layer(pj.merge(params), x), want)
    assert len(jax.tree.leaves(pj.partition(params)[0])) == 1, "the vector is trained more than once"
    assert f"trainable params: {vector.size} ||" in pj.summary(params)


def test_ia3_adds_up_the_gradients_of_matrix_and_bias(dense):
    params = perturbed(pj.apply_adapter(dense, pj.IA3Config(target_modules=["dense"], feedforward_modules=[])))
    trainable, frozen = pj.partition(params)
    x = normal(3, 5, 6)

    def loss(trainable):
        return jnp.sum(jnp.sin(pj.adapt(layer)(pj.combine(trainable, frozen), x)))

    vector = params["dense"]["kernel"].params["ia3_out"]
    want = jax.grad(lambda vector: jnp.sum(jnp.sin(layer(dense, x) * vector[None])))(vector)
    close(jax.grad(loss)(trainable)["dense"]["kernel"].params["ia3_out"], want)


def test_ia3_inputs_and_outputs_in_one_stack():
    """Layers of one leaf may be scaled at different sides; a layer that is no target is left alone."""
    tree = {"layers": {"up": {"kernel": normal(1, 3, 6, 4), "bias": normal(2, 3, 4)}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,)), ".*bias": pj.Layout((0,), (), (1,))}
    config = pj.IA3Config(target_modules=r"layers\.[02]\.up", feedforward_modules=r".*\.2\..*")
    params = perturbed(pj.apply_adapter(tree, config, layout=layout))
    kernel = params["layers"]["up"]["kernel"].params
    merged = pj.merge(params)["layers"]["up"]
    close(merged["kernel"][0], tree["layers"]["up"]["kernel"][0] * kernel["ia3_out"][0][None])
    close(merged["kernel"][2], tree["layers"]["up"]["kernel"][2] * kernel["ia3_in"][2][:, None])
    close(merged["bias"][0], tree["layers"]["up"]["bias"][0] * kernel["ia3_out"][0])
    for i in (1, 2):
        np.testing.assert_array_equal(merged["bias"][i], tree["layers"]["up"]["bias"][i])
    np.testing.assert_array_equal(merged["kernel"][1], tree["layers"]["up"]["kernel"][1])
    assert "trainable params: 10 ||" in pj.summary(params)  # 4 outputs and 6 inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["dense"]}, "needs feedforward_modules.*Write feedforward_modules=\\[\\]"),
        ({"target_modules": ["dense"], "feedforward_modules": ["x"]}, "has .*'x'.*, not in target_modules"),
    ],
)
def test_ia3_says_what_it_needs(options, message, dense):
    with pytest.raises(ValueError, match=message):
        pj.apply_adapter(dense, pj.IA3Config(**options))
