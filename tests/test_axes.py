"""fn= and args=: axes read off the program that uses the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import ROWS

import peft_jax as pj
from peft_jax.adapt.infer_layouts import read_layouts


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


# Rows whose layout the program does not tell, or tells otherwise: a stack that a product has no batch axis for is a
# second output axis, and what is merged or used in one way only has the convention's or no axes at all.
OTHERWISE = {
    "vmap over a stack": pj.Layout((), (1,), (0, 2)),
    "batched stack": pj.Layout((), (1,), (0, 2)),
    "two layers of a stack": pj.Layout((), (1,), (0, 2)),
    "vmap of a lookup in a stack": pj.Layout((), (1,), (0, 2), lookup=True),
    "w.T": pj.Layout((), (1,), (0,)),
    "weight is (out, in)": pj.Layout((), (1,), (0,)),
    "part of the input axes": pj.Layout((), (0,), (1, 2)),
    "w @ x": pj.Layout((), (1,), (0,)),
    "shard_map, transposed": pj.Layout((), (1,), (0,)),
    "shard_map, transposed, split": pj.Layout((), (1,), (0,)),
    "lookup, filled": pj.Layout((), (0,), (1,), lookup=True),
}
UNCLEAR = [
    "cast to 8 bits",
    "elementwise",
    "norm of the weight",
    "returned",
    "fused kernels",
    "weight times weight",
    "custom_vjp on the weight",
    "custom_jvp on the weight",
    "one row",
]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in UNCLEAR])
def test_axes_are_those_that_the_row_states(name):
    row = ROWS[name]
    fn = lambda params, x: row.fn(params["layers"]["dense"]["kernel"], x)  # noqa: E731
    params = {"layers": {"dense": {"kernel": normal(0, *row.shape)}}}
    (found,) = read_layouts(params, fn, (jax.ShapeDtypeStruct(row.x, jnp.float32),)).values()
    want = OTHERWISE.get(name, row.layout or pj.Layout())
    assert (found.stack, set(found.inp), set(found.out)) == (want.stack, set(want.inp), set(want.out))
    assert found.source == "read off the program"


@pytest.mark.parametrize("name", ["elementwise", "norm of the weight", "returned", "fused kernels"])
def test_a_leaf_without_a_product_keeps_the_convention(name):
    row = ROWS[name]
    fn = lambda params, x: row.fn(params["dense"]["kernel"], x)  # noqa: E731
    assert read_layouts({"dense": {"kernel": normal(0, *row.shape)}}, fn, (normal(1, *row.x),)) == {}


def model(params, x):
    h = jnp.take(params["embed"]["table"], x, axis=0)
    h = jnp.einsum("bti,ihd->bthd", h, params["query"]["w"])
    h = jnp.einsum("bthd,hdo->bto", h, params["out"]["w"])
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["blocks"]["w"])[0]
    return h @ params["embed"]["table"].T + params["bias"][None, None]


def tree():
    return {
        "bias": normal(0, 12),
        "blocks": {"w": normal(1, 3, 8, 8)},
        "embed": {"table": normal(2, 12, 8)},
        "out": {"w": normal(3, 2, 4, 8)},
        "query": {"w": normal(4, 8, 2, 4)},
        "spare": {"w": normal(5, 8, 8)},
    }


IDS = jnp.array([[1, 2, 3]])


def test_all_linear_means_every_weight_of_a_product_in_the_function():
    config = pj.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    params = pj.apply_lora(tree(), config, fn=model, args=(IDS,))
    shapes = {path: leaf.params["lora_A"].shape for path, leaf in leaves_of(params).items()}
    assert shapes == {"blocks.w": (3, 8, 2), "out.w": (8, 2), "query.w": (8, 2), "embed.table": (12, 2)}
    assert leaves_of(params)["blocks.w"].layout.index_after == ("blocks",)
    assert not any(use.merged for leaf in pj.explain(model, params, IDS).leaves for use in leaf.uses)
    got, want = pj.adapt(model)(params, IDS), model(pj.merge(params), IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    assert not np.allclose(want, model(tree(), IDS))
    less = pj.apply_lora(tree(), config.replace(exclude_modules=["out.w"]), fn=model, args=(IDS,))
    assert set(leaves_of(less)) == {"blocks.w", "query.w", "embed.table"}
    looked_up = lambda params, x: jnp.take(params["embed"]["table"], x, axis=0) @ params["spare"]["w"]  # noqa: E731
    alone = pj.apply_lora(tree(), config, fn=looked_up, args=(IDS,))
    assert set(leaves_of(alone)) == {"spare.w"}  # a lookup alone is no product


def leaves_of(params):
    from peft_jax.core.adapted import is_adapted

    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted)
    return {".".join(key.key for key in path): leaf for path, leaf in found if is_adapted(leaf)}


def test_an_embedding_that_is_also_the_head_is_a_lookup():
    params = pj.apply_lora(tree(), pj.LoraConfig(target_modules=["table"]), fn=model, args=(IDS,))
    layout = params["embed"]["table"].layout
    assert layout == pj.Layout(lookup=True, index_after=())


def test_what_is_told_comes_before_what_is_read():
    told = {r"query\.w": pj.Layout((), (0, 1), (2,))}
    params = pj.apply_lora(tree(), pj.LoraConfig(target_modules=["query.w"]), fn=model, args=(IDS,), layout=told)
    assert params["query"]["w"].layout.inp == (0, 1)


def test_contradicting_uses_are_an_error_with_a_way_out():
    def both(params, x):
        w = params["proj"]["w"]
        return jnp.einsum("bi,iho->bho", x, w), jnp.einsum("bho,iho->bi", x.reshape(-1, 2, 4), w)

    def mixed(params, x):
        w = params["proj"]["w"]
        return jnp.einsum("bi,iho->bho", x, w), jnp.einsum("bh,iho->bio", x[:, :2], w)

    params, config = {"proj": {"w": normal(0, 8, 2, 4)}}, pj.LoraConfig(target_modules=["proj.w"])
    x = normal(1, 5, 8)
    with pytest.raises(ValueError, match=r"'proj.w' .* as it is and transposed \(stack=\(\), inp=\(0,\).*layout="):
        pj.apply_lora(params, config, fn=both, args=(x,))
    with pytest.raises(ValueError, match=r"'proj.w' .* in more than one way .*layout="):
        pj.apply_lora(params, config, fn=mixed, args=(x,))
    named = {"proj": {"kernel": normal(0, 8, 8)}}
    turned = lambda params, x: x @ params["proj"]["kernel"].T @ params["proj"]["kernel"]  # noqa: E731
    found = pj.apply_lora(named, pj.LoraConfig(target_modules=["proj"]), fn=turned, args=(x,))
    assert found["proj"]["kernel"].layout == pj.Layout(index_after=())  # the convention decides between the two sides


def test_axes_that_a_program_does_not_tell_are_the_conventions_or_an_error():
    config, x = pj.LoraConfig(target_modules=["q"]), normal(1, 3, 4)
    stack = {"q": {"kernel": normal(0, 3, 4, 5)}}
    with pytest.raises(ValueError, match=r"looked up, which may be a choice of layers or of rows.*layout="):
        pj.apply_lora(stack, config, fn=lambda p, x: x @ jnp.take(p["q"]["kernel"], 1, axis=0), args=(x,))
    half = lambda p, x: jnp.einsum("bf,dhf->bdh", x[:, :3], p["q"]["kernel"].reshape(4, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match=r"in more than one way.*layout="):
        pj.apply_lora({"q": {"kernel": normal(0, 4, 6)}}, config, fn=half, args=(x,))
    thin = pj.apply_lora(
        {"q": {"kernel": normal(0, 1, 8)}}, config, fn=lambda p, x: x[:, :1] @ p["q"]["kernel"], args=(x,)
    )
    assert thin["q"]["kernel"].layout == pj.Layout()  # an axis of length 1 leaves no trace in a product
    both = {"a": {"kernel": normal(0, 4, 4)}, "b": {"kernel": normal(1, 4, 4)}}
    fn = lambda p, x: x @ (p["a"]["kernel"] @ p["b"]["kernel"])  # noqa: E731
    assert set(read_layouts(both, fn, (x,))) == {"a.kernel", "b.kernel"}


def test_quantize_reads_axes_too():
    params = pj.quantize(tree(), fn=model, args=(IDS,))
    scales = {path: leaf.scale.shape for path, leaf in weights_of(params).items()}
    assert scales == {"blocks.w": (3, 8), "out.w": (8,), "query.w": (8,), "embed.table": (8,)}


def weights_of(params):
    from peft_jax.core.weight import is_weight

    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    return {".".join(key.key for key in path): leaf for path, leaf in found if is_weight(leaf)}
