"""Which leaf is the bias of which matrix, stacked or not and whatever it is called; and what methods do with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.cli.demo_data import MODEL
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted


def normal(seed, *shape):
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def scanned(params, x):
    """Three stacked layers: a kernel, and a bias of either name."""
    layers = params["net"]["layers"]["dense"]
    bias = "b" if "b" in layers else "bias"
    return jax.lax.scan(lambda h, one: (jnp.tanh(h @ one["kernel"] + one[bias][None]), None), x, layers)[0]


def stacked(bias):
    return {"net": {"layers": {"dense": {"kernel": normal(0, 3, 8, 8), bias: normal(1, 3, 8)}}}}


X = normal(9, 5, 8)
TOLD = {r".*dense.kernel": pj.Layout((0,), (1,), (2,))}
HOW = {"program": {"fn": scanned, "args": (X,)}, "convention": {"layout": TOLD}}


def trained(params):
    """The tree with other numbers in its adapters."""
    trainable, frozen = pj.partition(params)
    return pj.combine(jax.tree.map(lambda leaf: leaf + 0.3, trainable), frozen)


def formula(weights, biases, x):
    x = np.asarray(x)
    for w, b in zip(weights, biases, strict=True):
        x = np.tanh(x @ w + b)
    return x


def product(leaf):
    """What LoRA adds to the kernels, zero for layers that are left out."""
    a, b = (np.asarray(leaf.params[role]) for role in ("lora_A", "lora_B"))
    return np.asarray(leaf.state["scaling"])[:, None, None] * (a @ b)


def lora_only(w, b, leaf):
    return w + product(leaf["kernel"]), np.asarray(leaf["bias"].params["bias"])


def ia3(w, b, leaf):
    scale = np.asarray(leaf["kernel"].params["ia3_out"])
    return w * scale[:, None, :], b * scale


def lora_bias(w, b, leaf):
    return w + product(leaf["kernel"]), b + 4 * np.asarray(leaf["kernel"].params["lora_bias"])


def beft(w, b, leaf):
    return w, b + np.asarray(leaf["kernel"].params["beft_bias"])


def saved(w, b, leaf):
    return tuple(np.asarray(leaf[name].params["modules_to_save"]) for name in ("kernel", "bias"))


def one_layer(w, b, leaf):
    hit = np.array([False, True, False])
    return w + product(leaf["kernel"]), np.where(hit[:, None], np.asarray(leaf["bias"].params["bias"]), b)


LORA = {"r": 2, "target_modules": ["dense"]}
METHODS = {
    "lora_only": (pj.LoraConfig(**LORA, bias="lora_only"), lora_only),
    "all": (pj.LoraConfig(**LORA, bias="all"), lora_only),
    "IA3": (pj.IA3Config(target_modules=["dense"], feedforward_modules=[]), ia3),
    "lora_bias": (pj.LoraConfig(**LORA, lora_bias=True), lora_bias),
    "BEFT": (pj.BeftConfig(target_modules=["dense"]), beft),
    "modules_to_save": (pj.LoraConfig(r=2, target_modules=["head"], modules_to_save=["dense"]), saved),
    "one layer": (pj.LoraConfig(**LORA, bias="lora_only", layers_to_transform=[1]), one_layer),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("bias", ["bias", "b"])
@pytest.mark.parametrize("name", METHODS)
def test_a_stacked_bias_goes_with_its_kernel(name, bias, how):
    config, expected = METHODS[name]
    base = {**stacked(bias), "head": {"kernel": jnp.ones((8, 8))}}  # for an adapter beside what is saved whole
    params = trained(pj.apply_adapter(base, config, **HOW[how]))
    dense = [(path, leaf) for path, leaf in adapted_leaves(params) if not path.startswith("head.")]
    leaves = {"kernel" if path.endswith("kernel") else "bias": leaf for path, leaf in dense}
    assert set(leaves) == {"kernel", "bias"}
    w, b = (np.asarray(base["net"]["layers"]["dense"][one]) for one in ("kernel", bias))
    new = expected(w, b, leaves)
    got = pj.adapt(scanned)(params, X)
    np.testing.assert_allclose(got, formula(*new, X), rtol=0, atol=1e-5)
    np.testing.assert_allclose(scanned(pj.merge(params), X), got, rtol=0, atol=1e-5)
    assert not np.allclose(new[1], b, atol=1e-2)

    tensors = pj.get_peft_model_state_dict(params)
    again = pj.set_peft_model_state_dict(base, config, tensors, layout=TOLD)
    np.testing.assert_allclose(pj.adapt(scanned)(again, X), got, rtol=0, atol=1e-5)
    assert all(".head." in key or (".layers." in key and ".dense." in key) for key in tensors)
    assert sum(key.endswith(("base_layer.bias", "dense.bias")) for key in tensors) == {
        "lora_only": 3,
        "all": 3,
        "modules_to_save": 3,
        "one layer": 1,
    }.get(name, 0)


@pytest.mark.parametrize(
    "config", [pj.OFTConfig(r=0, oft_block_size=2, target_modules=["dense"]), pj.LoraConfig(**LORA, use_dora=True)]
)
def test_what_changes_the_matrix_alone_leaves_the_bias(config):
    base = stacked("b")
    params = trained(pj.apply_adapter(base, config, fn=scanned, args=(X,)))
    merged = pj.merge(params)["net"]["layers"]["dense"]
    assert merged["b"] is base["net"]["layers"]["dense"]["b"]
    want = formula(np.asarray(merged["kernel"]), np.asarray(merged["b"]), X)
    np.testing.assert_allclose(pj.adapt(scanned)(params, X), want, rtol=0, atol=1e-5)
    assert not np.allclose(want, scanned(base, X), atol=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_a_bias_beside_an_int8_kernel(how):
    base = stacked("b")
    int8 = pj.quantize(base, **HOW[how])
    assert int8["net"]["layers"]["dense"]["b"] is base["net"]["layers"]["dense"]["b"]
    config = pj.LoraConfig(**LORA, bias="lora_only")
    params = trained(pj.apply_lora(int8, config))  # a quantized kernel has its axes
    assert params["net"]["layers"]["dense"]["b"].params["bias"].shape == (3, 8)
    got, want = pj.adapt(scanned)(params, X), scanned(pj.merge(params), X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    quantized_after = pj.quantize(pj.apply_lora(base, config, **HOW[how]))["net"]["layers"]["dense"]["b"]
    assert quantized_after.params["bias"].shape == (3, 8) and quantized_after.layout.stack == (0,)


def mlp(params, x):
    h = jnp.tanh(x @ params["first"] + params["shift"][None])
    return (x + h @ params["second"]) + params["last"][None]


def recurrent(params, x):
    return jnp.tanh(x @ params["wx"] + x @ params["wh"] + params["b"][None])


def heads(params, x):
    return jnp.einsum("bi,iho->bho", x, params["q"]["kernel"]) + params["q"]["bias"][None]


def experts(params, x):
    each = jnp.einsum("bi,eio->ebo", x, params["up"]["kernel"]) + 0
    return jnp.einsum("ebo,eoi->ebi", each, params["down"]["kernel"]) + params["down"]["offset"][:, None]


def apart(params, x):
    step = jax.checkpoint(lambda h, one: (jax.jit(jnp.add)(h @ one[0], one[1][None]), None))
    return jax.lax.scan(step, x, (params["weights"]["a"], params["shifts"]["a"]))[0]


PROGRAMS = {
    "any names, and a residual before": (
        mlp,
        {"first": (8, 6), "shift": (6,), "second": (6, 8), "last": (8,)},
        {"shift": "first", "last": "second"},
    ),
    "sum of two products": (recurrent, {"wx": (8, 8), "wh": (8, 8), "b": (8,)}, {}),
    "heads": (heads, {"q.kernel": (8, 2, 3), "q.bias": (2, 3)}, {"q.bias": "q.kernel"}),
    "experts": (
        experts,
        {"up.kernel": (3, 8, 6), "down.kernel": (3, 6, 8), "down.offset": (3, 8)},
        {"down.offset": "down.kernel"},
    ),
    "apart": (apart, {"weights.a": (3, 8, 8), "shifts.a": (3, 8)}, {"shifts.a": "weights.a"}),
}


def tree_of(shapes):
    tree = {}
    for seed, (path, shape) in enumerate(shapes.items()):
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = normal(seed, *shape)
    return tree


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bias_is_what_the_program_adds_to_a_product(name):
    fn, shapes, biases = PROGRAMS[name]
    base = tree_of(shapes)
    config = pj.LoraConfig(r=2, target_modules="all-linear", bias="lora_only")
    params = trained(pj.apply_lora(base, config, fn=fn, args=(X,)))
    found = {path: leaf for path, leaf in adapted_leaves(params) if not leaf.layout.inp}
    assert set(found) == set(biases)
    got, want = pj.adapt(fn)(params, X), fn(pj.merge(params), X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    scaled = pj.IA3Config(target_modules="all-linear", feedforward_modules=[])
    params = trained(pj.apply_adapter({"inside": base}, scaled, fn=lambda p, x: fn(p["inside"], x), args=(X,)))
    leaves = dict(adapted_leaves(params))
    for bias, matrix in biases.items():
        factor = np.asarray(leaves[f"inside.{matrix}"].params["ia3_out"])
        plain = np.asarray(leaves[f"inside.{bias}"].base)
        merged = np.asarray(leaves[f"inside.{bias}"].dense())
        np.testing.assert_allclose(merged, plain * factor.reshape(plain.shape), rtol=0, atol=1e-6)
    pj.get_peft_model_state_dict(params)


def attend(params, x):
    """Heads that are scanned, as Flax stacks its attention: biases (layer, head, feature)."""

    def layer(h, one):
        q = jnp.einsum("bi,iho->bho", h, one["kernel"]) + one["bias"][None]
        return jnp.tanh(q.reshape(5, 8)), None

    return jax.lax.scan(layer, x, params["layers"]["q"])[0]


def channels_first(params, x):
    """A convolution as Equinox has it: a bias (channels, 1)."""
    numbers = ("NCW", "OIW", "NCW")
    y = jax.lax.conv_general_dilated(x[None], params["q"]["weight"], (1,), "SAME", dimension_numbers=numbers)
    return y[0] + params["q"]["bias"]


# name: (program, shapes, axes of the matrix)
RANK_2 = {
    "heads": (heads, {"q.kernel": (8, 2, 4), "q.bias": (2, 4)}, pj.Layout((), (0,), (1, 2))),
    "stacked heads": (
        attend,
        {"layers.q.kernel": (3, 8, 2, 4), "layers.q.bias": (3, 2, 4)},
        pj.Layout((0,), (1,), (2, 3)),
    ),
    "channels": (channels_first, {"q.weight": (6, 5, 3), "q.bias": (6, 1)}, pj.Layout((), (1, 2), (0,), taps=(2,))),
}
ON_Q = {"target_modules": ["q"]}
ON_RANK_2 = {
    "lora_only": pj.LoraConfig(r=2, **ON_Q, bias="lora_only"),
    "all": pj.LoraConfig(r=2, **ON_Q, bias="all"),
    "lora_bias": pj.LoraConfig(r=2, **ON_Q, lora_bias=True),
    "IA3": pj.IA3Config(**ON_Q, feedforward_modules=[]),
    "ROAD": pj.RoadConfig(**ON_Q, group_size=2),
    "BEFT": pj.BeftConfig(**ON_Q),
    "modules_to_save": pj.LoraConfig(r=2, target_modules=["head"], modules_to_save=["q"]),
}


@pytest.mark.parametrize("how", ["program", pytest.param("convention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ON_RANK_2)
@pytest.mark.parametrize("name", RANK_2)
def test_a_bias_of_rank_2_is_that_of_its_matrix(name, method, how):
    fn, shapes, layout = RANK_2[name]
    base, config = {**tree_of(shapes), "head": {"kernel": normal(7, 5, 5)}}, ON_RANK_2[method]
    run = lambda params, x: fn(params, params["head"]["kernel"] @ x)  # noqa: E731
    told = {"fn": run, "args": (X,)} if how == "program" else {"layout": {r".*q\.(kernel|weight)": layout}}
    params = trained(pj.apply_adapter(pj.quantize(base, **told), config, **({} if "layout" in told else told)))
    leaves = dict(adapted_leaves(params))
    (path,) = (path for path in leaves if path.endswith("bias"))
    moved = np.asarray(leaves[path].dense()) - np.asarray(leaves[path].base)
    assert np.abs(moved).max() > 1e-2 and moved.shape == shapes[path]
    factor = next((leaf.params["ia3_out"] for leaf in leaves.values() if "ia3_out" in leaf.params), None)
    if factor is not None:
        want = np.asarray(leaves[path].base) * (np.asarray(factor).reshape(shapes[path]) - 1)
        np.testing.assert_allclose(moved, want, rtol=0, atol=1e-6)
    got, want = pj.adapt(run)(params, X), run(pj.merge(params), X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    tensors = pj.get_peft_model_state_dict(params)
    again = pj.set_peft_model_state_dict(pj.quantize(base, **told), config, tensors, **told)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_road_turns_a_bias_of_heads_as_their_outputs():
    base = tree_of({"q.kernel": (8, 2, 4), "q.bias": (2, 4)})
    params = trained(pj.apply_adapter(base, ON_RANK_2["ROAD"], fn=heads, args=(X,)))
    adapter = params["q"]["kernel"].params
    angles, scales = np.asarray(adapter["road_theta"]), np.asarray(adapter["road_alpha"])
    pairs = np.asarray(base["q"]["bias"]).reshape(4, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    turned = [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)]
    want = (scales * np.stack(turned)).T.reshape(2, 4)
    np.testing.assert_allclose(params["q"]["bias"].dense(), want, rtol=0, atol=1e-6)


def test_a_bias_that_is_no_fit_is_an_error_where_it_is_to_be_trained():
    base = {"layers": {"q": {"kernel": normal(0, 3, 8, 8), "bias": normal(1, 3, 7)}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    config = pj.LoraConfig(r=2, target_modules=["q"])
    assert pj.apply_lora(base, config, layout=layout)["layers"]["q"]["bias"] is base["layers"]["q"]["bias"]
    with pytest.raises(
        ValueError, match=r"'layers.q.bias' .* it is no bias of 'layers.q.kernel', which has .*\(3,\).* 8 out"
    ):
        pj.apply_lora(base, config.replace(bias="lora_only"), layout=layout)


def test_by_convention_b1_goes_with_w1_and_what_does_not_fit_is_no_bias():
    base = {"w1": normal(0, 8, 6), "b1": normal(1, 6), "w2": normal(2, 6, 8), "b2": normal(3, 7), "b": normal(4, 8)}
    config = pj.LoraConfig(r=2, target_modules=["w1", "w2"], bias="lora_only")
    assert {path for path, _ in adapted_leaves(pj.apply_lora(base, config))} == {"w1", "w2", "b1"}


def test_a_file_is_loaded_with_the_biases_that_a_program_has(tmp_path):
    base = {"first": normal(0, 8, 6), "shift": normal(1, 6), "second": normal(2, 6, 8), "last": normal(3, 8)}
    config = pj.IA3Config(target_modules=["first"], feedforward_modules=[])
    params = trained(pj.apply_adapter(base, config, fn=mlp, args=(X,)))
    pj.interop.save_adapter(params, tmp_path)
    want = pj.adapt(mlp)(params, X)
    again = pj.interop.load_adapter(base, tmp_path, fn=mlp, args=(X,))
    np.testing.assert_allclose(pj.adapt(mlp)(again, X), want, rtol=0, atol=1e-6)
    by_convention = pj.interop.load_adapter(base, tmp_path)
    assert not np.allclose(pj.adapt(mlp)(by_convention, X), want, atol=1e-3), "the bias is what only the program tells"


def test_a_changed_adapter_is_shared_with_its_bias_again():
    """`map_adapted` on a tree: the bias is scaled by the changed vector, and a partition stays without it."""
    config = pj.IA3Config(target_modules=["dense"], feedforward_modules=[])
    params = pj.apply_adapter(stacked("bias"), config, layout=TOLD)

    def doubled(path, leaf):
        return dataclasses.replace(leaf, params={role: 2 * array for role, array in leaf.params.items()})

    bias = pj.merge(map_adapted(doubled, params))["net"]["layers"]["dense"]["bias"]
    np.testing.assert_allclose(bias, 2 * stacked("bias")["net"]["layers"]["dense"]["bias"], rtol=1e-6)
    trainable, _ = pj.partition(params)
    changed = map_adapted(lambda path, leaf: leaf, trainable)
    assert jax.tree.structure(changed) == jax.tree.structure(trainable)


@pytest.mark.parametrize("bank_is_active", [True, False])
def test_partitions_whose_leaves_share_trained_arrays_are_mapped(bank_is_active):
    """VB-LoRA's vectors, which a partition has as None in all leaves but the first, and the frozen half in it too."""
    params = {name: {"kernel": jnp.ones((8, 8))} for name in "ab"}
    bank = pj.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, target_modules=["a", "b"])
    params = pj.apply_adapter(params, bank)
    if not bank_is_active:
        params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["a"]), adapter_name="lora")
        params = pj.set_adapter(params, "lora")
    halves = pj.partition(params)
    mapped = [map_adapted(lambda path, leaf: leaf, half) for half in halves]
    assert [jax.tree.structure(half) for half in mapped] == [jax.tree.structure(half) for half in halves]
    want, found = jax.tree.leaves(params), jax.tree.leaves(pj.combine(*mapped))
    assert len(want) == len(found) and all((one == other).all() for one, other in zip(want, found, strict=True))


def test_a_handle_is_mapped_like_its_tree():
    model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
    model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    paths = []
    mapped = map_adapted(lambda path, leaf: paths.append(path) or leaf, model)
    assert type(mapped) is type(model) and paths == [path for path, _ in adapted_leaves(model.params)]
    key = jax.random.key(0)
    (_, of_handle), (_, of_tree) = (
        adapted_leaves(pj.with_dropout(one, key))[0] for one in (model, {"params": model.params})
    )
    assert (of_handle.state["dropout"]["key"] == of_tree.state["dropout"]["key"]).all()
