"""On a mesh of 8: adapters lie as their base does, and no frozen weight is gathered that would not be without them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import peft_jax as pj
from peft_jax.core.partition_specs import dividing_spec


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


SPECS = {
    "columns": ((8, 16), P(None, "tensor"), pj.Layout(), P(None, None), P(None, "tensor")),
    "rows": ((8, 16), P("tensor", None), pj.Layout(), P("tensor", None), P(None, None)),
    "both": ((8, 16), P("data", "tensor"), pj.Layout(), P("data", None), P(None, "tensor")),
    "two mesh axes": ((8, 16), P(("data", "tensor")), pj.Layout(), P(("data", "tensor"), None), P(None, None)),
    "stacked": (
        (4, 8, 16),
        P(None, "data", "tensor"),
        pj.Layout((0,), (1,), (2,)),
        P(None, "data"),
        P(None, None, "tensor"),
    ),
    "heads": ((8, 4, 6), P(None, "tensor"), pj.Layout((), (0,), (1, 2)), P(None, None), P(None, "tensor")),
    "inside of heads": ((8, 4, 6), P(None, None, "tensor"), pj.Layout((), (0,), (1, 2)), P(), P()),
    "out first": ((16, 8), P("tensor", "data"), pj.Layout((), (1,), (0,)), P("data", None), P(None, "tensor")),
}


@pytest.mark.parametrize("bits", [None, 8], ids=["float", "int8"])
@pytest.mark.parametrize(("shape", "spec", "layout", "a", "b"), SPECS.values(), ids=SPECS)
def test_adapters_inherit_the_axes_that_they_share_with_the_base(shape, spec, layout, a, b, bits):
    mesh = mesh_of(AxisType.Auto)
    params = {"layers": {"dense": {"kernel": jax.device_put(normal(0, *shape), NamedSharding(mesh, spec))}}}
    params = pj.quantize(params, bits, layout={".*": layout}) if bits else params
    config = pj.LoraConfig(r=2, target_modules=".*dense.*")
    leaf = pj.apply_lora(params, config, layout={".*": layout})["layers"]["dense"]["kernel"]
    for role, want in (("lora_A", a), ("lora_B", b)):
        array = leaf.params[role]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, want), array.ndim), (role, array.sharding)
    assert leaf.state["scaling"].sharding.mesh == mesh


def test_a_part_of_an_axis_is_split_by_those_of_its_mesh_axes_that_divide_it():
    """As `peft_jax.train.mesh.spec` does."""
    spec = dividing_spec(P(("data", "tensor"), "tensor"), (4, 6), mesh_of(AxisType.Auto))
    assert spec == P("data", "tensor")


def column_and_row_parallel(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"])
    return jnp.matmul(h, params["down"]["kernel"], out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, P("data")))


def plain(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss_of(fn, frozen):
    return lambda trainable, x: jnp.mean(fn(pj.combine(trainable, frozen), x) ** 2)


@pytest.mark.usefixtures("optimizing_compiler")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_no_frozen_weight_is_gathered_and_the_numbers_are_those_of_one_device(kind):
    mesh = mesh_of(kind)
    tree = {"up": {"kernel": normal(0, 16, 32)}, "down": {"kernel": normal(1, 32, 16)}}
    config = pj.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    x = normal(2, 8, 16)
    alone = pj.partition(pj.apply_lora(tree, config))
    want, want_gradient = jax.value_and_grad(loss_of(pj.adapt(plain), alone[1]))(alone[0], x)
    with jax.set_mesh(mesh):
        fn = column_and_row_parallel if kind == AxisType.Explicit else plain
        places = {"up": {"kernel": P(None, "tensor")}, "down": {"kernel": P("tensor", None)}}
        sharded = jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), tree, places)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        trainable, frozen = pj.partition(pj.apply_lora(sharded, config))
        ours = jax.jit(jax.value_and_grad(loss_of(pj.adapt(fn), frozen)))
        got, gradient = ours(trainable, x)
        text = ours.lower(trainable, x).compile().as_text()
        unadapted = jax.jit(jax.grad(lambda x, w: jnp.mean(fn(w, x) ** 2))).lower(x, sharded).compile().as_text()
    assert gathered(text) <= gathered(unadapted), "a frozen weight is gathered"
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
        assert np.abs(b).max() > 1e-3


def gathered(text):
    """Shapes that all-gathers of at least a weight's shard make, in a compiled program."""
    shapes = re.findall(r"= f32\[([\d,]*)\][^ ]* all-gather", text)
    return {shape for shape in shapes if np.prod([int(n) for n in shape.split(",") if n]) >= 16 * 32 // 8}


@pytest.mark.usefixtures("optimizing_compiler")
def test_the_measure_sees_a_weight_that_is_gathered():
    mesh = mesh_of(AxisType.Auto)
    w = jax.device_put(normal(0, 16, 32), NamedSharding(mesh, P(None, "tensor")))
    run = jax.jit(lambda w: w * 2, out_shardings=NamedSharding(mesh, P()))
    assert gathered(run.lower(w).compile().as_text()) == {"16,32"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_scanned_stack_of_heads_on_a_mesh(kind):
    """Three-dimensional kernels, sharded by heads, in a scan with checkpoint."""
    mesh = mesh_of(kind)
    tree = {"layers": {"query": {"kernel": normal(0, 2, 8, 4, 6)}, "out": {"kernel": normal(1, 2, 4, 6, 8)}}}
    layout = {".*query.*": pj.Layout((0,), (1,), (2, 3)), ".*out.*": pj.Layout((0,), (1, 2), (3,))}
    config = pj.LoraConfig(r=2, target_modules=["query", "out"], init_lora_weights=False)

    def model(params, x, spec=None):
        def layer(h, w):
            heads = jnp.tanh(jnp.einsum("bi,iho->bho", h, w["query"]["kernel"]))
            return jnp.einsum("bho,hoi->bi", heads, w["out"]["kernel"], out_sharding=spec), None

        return jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0]

    x = normal(2, 8, 8)
    alone = pj.partition(pj.apply_lora(tree, config, layout=layout))
    want = jax.grad(loss_of(pj.adapt(model), alone[1]))(alone[0], x)
    with jax.set_mesh(mesh):
        places = {"layers": {"query": {"kernel": P(None, None, "tensor")}, "out": {"kernel": P(None, "tensor")}}}
        sharded = jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), tree, places)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        trainable, frozen = pj.partition(pj.apply_lora(sharded, config, layout=layout))
        spec = NamedSharding(mesh, P("data")) if kind == AxisType.Explicit else None
        fn = pj.adapt(lambda params, x: model(params, x, spec))
        got = jax.jit(jax.grad(loss_of(fn, frozen)))(trainable, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}])
@pytest.mark.parametrize("base", [None, 8])
def test_inputs_that_are_sharded_on_an_explicit_mesh(fields, base):
    """The contraction is over devices, so that each product has to say how its result is sharded."""
    mesh, tree = mesh_of(AxisType.Explicit), {"up": {"kernel": normal(0, 16, 32)}}
    config = pj.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False, **fields)
    fn = lambda params, x, spec=None: jnp.einsum("bi,io->bo", x, params["up"]["kernel"], out_sharding=spec)  # noqa: E731
    x = normal(2, 8, 16)

    def gradient(tree, x, spec):
        tree = tree if base is None else pj.quantize(tree, base, target_modules=["up"])
        trainable, frozen = pj.partition(pj.apply_lora(tree, config))
        loss = loss_of(pj.adapt(lambda params, x: fn(params, x, spec)), frozen)
        return jax.jit(jax.value_and_grad(loss))(trainable, x)

    want = gradient(tree, x, None)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("tensor", None))
        sharded = {"up": {"kernel": jax.device_put(tree["up"]["kernel"], spec)}}
        x = jax.device_put(x, NamedSharding(mesh, P("data", "tensor")))
        got = gradient(sharded, x, P("data", None))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
