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
    "negative": pj.Layout((), (1,), (0,)),
    "part of both, transposed": pj.Layout((), (1,), (0,)),
    "padded, cut and turned": pj.Layout((), (1,), (0,)),
    "stacked, then one": pj.Layout((), (1,), (0,)),
    "lookup, filled": pj.Layout((), (0,), (1,), lookup=True),
}
UNCLEAR = [
    "cast to 8 bits",
    "elementwise",
    "norm of the weight",
    "returned",
    "fused kernels, moved",
    "one output",
    "fused kernels, inputs",
    "weight times weight",
    "custom_vjp on the weight",
    "custom_vjp that changes its gradient",
    "custom_jvp that changes its gradient",
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


@pytest.mark.parametrize("name", ["elementwise", "norm of the weight", "returned", "fused kernels, moved"])
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
        pj.apply_lora(stack, config, fn=lambda p, x: x.sum() + jnp.take(p["q"]["kernel"], 1, axis=0), args=(x,))
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


# ---- Stacks: layers, experts, members; vectors


def names_in(params):
    from peft_jax.core.paths import leaf_names

    return {
        path: leaf_names(path, leaf.layout, leaf.shape).ravel().tolist() for path, leaf in leaves_of(params).items()
    }


def trained(params):
    """The tree with other numbers in its adapters."""
    trainable, frozen = pj.partition(params)
    return pj.combine(jax.tree.map(lambda leaf: leaf + 0.1, trainable), frozen)


def alive(params, base, fn, *args):
    """What the adapted function gives, which is what merging gives and the base does not."""
    got, want = pj.adapt(fn)(params, *args), fn(pj.merge(params), *args)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
    assert not np.allclose(got, fn(base, *args), atol=1e-3)
    return got


def of_experts(layer, x):
    return jnp.tanh(jnp.einsum("ebi,eio->ebo", x, layer["gate"]["kernel"]))


def member(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"]


def all_experts(params, x):
    return jnp.einsum(
        "tef,efd->ted", jax.nn.silu(jnp.einsum("td,edf->tef", x, params["a"]["kernel"])), params["b"]["kernel"]
    )


def heads_first(params, x):
    q = jnp.einsum("ti,hid->htd", x, params["a"]["kernel"]) + params["a"]["bias"][:, None]
    scores = jax.nn.softmax(jnp.einsum("htd,hsd->hts", q, q), axis=-1)
    return jnp.einsum("htd,hdo->to", scores @ q, params["b"]["kernel"])


MEMBERS = {
    "ensemble": (lambda params, x: jax.vmap(member, in_axes=(0, None))(params, x).mean(0), pj.Layout((0,), (1,), (2,))),
    "ensemble, members last": (jax.vmap(member, in_axes=(0, None), out_axes=1), pj.Layout((0,), (1,), (2,))),
    "ensemble, vmap inside": (
        lambda params, x: jax.vmap(lambda one: jax.vmap(jax.jit(member), in_axes=(None, 0))(one, x[:, None]))(params),
        pj.Layout((0,), (1,), (2,)),
    ),
    "all experts": (all_experts, pj.Layout((0,), (1,), (2,))),
    "heads": (heads_first, pj.Layout((), (1,), (0, 2))),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_that_share_an_input_have_an_adapter_each(name):
    fn, want = MEMBERS[name]
    params = {"a": {"kernel": normal(0, 3, 8, 6), "bias": normal(2, 3, 6)}, "b": {"kernel": normal(1, 3, 6, 4)}}
    x = normal(3, 5, 8)
    config = pj.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False)
    adapted = pj.apply_lora(params, config, fn=fn, args=(x,))
    layout = adapted["a"]["kernel"].layout
    assert (layout.stack, layout.inp, layout.out) == (want.stack, want.inp, want.out)
    alive(adapted, params, fn, x)


def test_a_matrix_of_one_input_has_it_as_its_input():
    params = {"a": {"w": normal(0, 2, 8, 1)}, "b": {"w": normal(1, 2, 1, 8)}}

    def fn(params, x):
        step = lambda h, w: (w[1] @ jnp.tanh(w[0] @ h), None)  # noqa: E731
        return jax.lax.scan(step, x, (params["a"]["w"], params["b"]["w"]))[0]

    found = read_layouts(params, fn, (normal(2, 1),))
    assert [(found[path].inp, found[path].out) for path in ("a.w", "b.w")] == [((2,), (1,)), ((2,), (1,))]


def test_experts_are_not_counted_as_layers():
    layers = {str(i): {"gate": {"kernel": normal(i, 3, 8, 8)}} for i in range(2)}
    base, x = {"model": {"layers": layers}}, normal(9, 3, 5, 8)
    fn = lambda params, x: of_experts(params["model"]["layers"]["1"], of_experts(params["model"]["layers"]["0"], x))  # noqa: E731
    config = pj.LoraConfig(r=2, target_modules=["gate"], layers_to_transform=[1], rank_pattern={"layers.1.gate": 3})
    params = trained(pj.apply_lora(base, config, fn=fn, args=(x,)))
    name = "model.layers.1.gate"
    assert names_in(params) == {f"{name}.kernel": [f"{expert}.{name}" for expert in range(3)]}
    (leaf,) = leaves_of(params).values()
    assert leaf.state["rank"].tolist() == [3, 3, 3]
    got, w = alive(params, base, fn, x), [np.asarray(layers[str(i)]["gate"]["kernel"]) for i in range(2)]
    a, b = (np.asarray(leaf.params[role]) for role in ("lora_A", "lora_B"))
    h = np.tanh(np.einsum("ebi,eio->ebo", x, w[0]))
    want = np.tanh(np.einsum("ebi,eio->ebo", h, w[1] + 8 / 3 * a @ b))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    tensors = pj.get_peft_model_state_dict(params)
    again = pj.set_peft_model_state_dict(base, config, tensors, layout={r".*1\.gate\.kernel": leaf.layout})
    np.testing.assert_allclose(pj.adapt(fn)(again, x), got, rtol=0, atol=1e-5)


def scan_of(run):
    return lambda layers, x: jax.lax.scan(lambda h, layer: (jnp.tanh(run(layer, h)), None), x, layers)[0]


def nested(path, array):
    for part in reversed(path.split(".")):
        array = {part: array}
    return array


def at(path, tree):
    for part in path.split("."):
        tree = tree[part]
    return tree


matmul, batched = (lambda w, x: x @ w), (lambda w, x: jnp.einsum("ebi,eio->ebo", x, w))
STACKS = {
    "w": (scan_of(matmul), (2, 8, 8), ["0.w", "1.w"]),
    "dense.kernel": (scan_of(matmul), (2, 8, 8), ["0.dense", "1.dense"]),
    "params.h.attn.kernel": (scan_of(matmul), (2, 8, 8), ["params.h.0.attn", "params.h.1.attn"]),
    "net.layers.0.mlp.kernel": (scan_of(matmul), (2, 8, 8), ["0.net.layers.0.mlp", "1.net.layers.0.mlp"]),
    "layers.0.mlp.kernel": (batched, (2, 8, 8), ["0.layers.0.mlp", "1.layers.0.mlp"]),
    "members.w": (batched, (2, 8, 8), ["0.members.w", "1.members.w"]),
    "net.layers.up.kernel": (
        scan_of(batched),
        (3, 2, 8, 8),
        [f"{expert}.net.layers.{layer}.up" for layer in range(3) for expert in range(2)],
    ),
    "net.blocks.up.kernel": (
        lambda w, x: jax.vmap(scan_of(matmul))(w, x),
        (2, 3, 8, 8),
        [f"{member}.net.blocks.{layer}.up" for member in range(2) for layer in range(3)],
    ),
    "groups.layers.w": (
        scan_of(scan_of(matmul)),
        (2, 3, 8, 8),
        [f"groups.{group}.layers.{layer}.w" for group in range(2) for layer in range(3)],
    ),
}


@pytest.mark.parametrize("path", STACKS)
def test_layers_of_a_stack_have_a_target_s_name_and_their_own_number(path):
    run, shape, names = STACKS[path]
    base, x = nested(path, 0.3 * normal(0, *shape)), normal(1, 2, 5, 8)
    fn = lambda params, x: run(at(path, params), x)  # noqa: E731
    last = path.removesuffix(".kernel").rpartition(".")[2]
    params = trained(pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=[last]), fn=fn, args=(x,)))
    assert names_in(params) == {path: names}
    alive(params, base, fn, x)
    keys = {key.removeprefix("base_model.model.") for key in pj.get_peft_model_state_dict(params)}
    assert keys == {f"{name}.lora_{role}.weight" for name in names for role in "AB"}


def test_layers_of_scanned_experts_are_chosen_by_the_layer():
    base, x = {"net": {"layers": {"up": {"kernel": normal(0, 3, 2, 8, 8)}}}}, normal(1, 2, 5, 8)
    fn = lambda params, x: scan_of(batched)(params["net"]["layers"]["up"]["kernel"], x)  # noqa: E731
    config = pj.LoraConfig(r=2, target_modules=["up"], layers_to_transform=[1])
    (leaf,) = leaves_of(pj.apply_lora(base, config, fn=fn, args=(x,))).values()
    assert leaf.state["rank"].tolist() == [[0, 0], [2, 2], [0, 0]]
    config = pj.LoraConfig(r=2, target_modules=["gate"], layers_to_transform=[1])
    base = {"moe": {"gate": {"kernel": normal(0, 2, 8, 8)}}}
    with pytest.raises(ValueError, match=r"layers_to_transform \[1\] hits no target. Layers found: \[\]"):
        pj.apply_lora(base, config, fn=lambda params, x: of_experts(params["moe"], x), args=(x,))


VECTORS = {
    "einsum of batches": lambda h, gain: jnp.einsum("bi,i->bi", h, gain),
    "product": lambda h, gain: h * gain[None],
    "sum": lambda h, gain: h + gain[None],
    "contracted to one number": lambda h, gain: h + jnp.einsum("bi,i->b", h, gain)[:, None],
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_stacked_vector_is_no_matrix(name):
    base, x = {"layers": {"w": 0.3 * normal(0, 3, 8, 8), "gain": normal(1, 3, 8)}}, normal(2, 5, 8)
    use = VECTORS[name]
    fn = lambda params, x: scan_of(lambda layer, h: use(jnp.sin(h @ layer["w"]), layer["gain"]))(params["layers"], x)  # noqa: E731
    told = {"fn": fn, "args": (x,)}
    params = trained(pj.apply_lora(base, pj.LoraConfig(r=2, target_modules="all-linear"), **told))
    assert set(leaves_of(params)) == {"layers.w"}
    alive(params, base, fn, x)
    wrong = r"'gain' hits none of .*'layers.0.gain' is a vector.*modules_to_save"
    with pytest.raises(ValueError, match=wrong):
        pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=["w", "gain"]), **told)
    with pytest.raises(ValueError, match=r"regex .* hits none of .*'layers.0.gain' is a vector"):
        pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=".*gain"), **told)
    with pytest.raises(ValueError, match=wrong):
        pj.quantize(base, target_modules=["gain"], **told)
    assert set(weights_of(pj.quantize(base, **told))) == {"layers.w"}

    config = pj.LNTuningConfig(target_modules=["layers.1.gain"])
    params = trained(pj.apply_adapter(base, config, **told))
    gain = np.asarray(base["layers"]["gain"]) + np.array([[0], [0.1], [0]], np.float32)
    np.testing.assert_allclose(pj.merge(params)["layers"]["gain"], gain, rtol=0, atol=1e-6)
    alive(params, base, fn, x)
    (key,) = pj.get_peft_model_state_dict(params)
    assert key == "base_model.model.layers.1.gain.ln_tuning_layers.weight"


def test_a_product_with_batch_axes_alone_has_no_matrix():
    base, x = {"q": {"kernel": normal(0, 8, 8)}, "mix": {"kernel": normal(1, 5, 8)}}, normal(2, 5, 8)
    fn = lambda params, x: jnp.einsum("bi,bi->bi", x @ params["q"]["kernel"], params["mix"]["kernel"])  # noqa: E731
    params = pj.apply_lora(base, pj.LoraConfig(r=2, target_modules="all-linear"), fn=fn, args=(x,))
    assert set(leaves_of(params)) == {"q.kernel"}
    with pytest.raises(ValueError, match="'mix' is a vector"):
        pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=["mix"]), fn=fn, args=(x,))


@pytest.mark.parametrize("name", ["scale", "gain", "bias"])
def test_a_stacked_vector_is_no_matrix_by_convention(name):
    base = {"layers": {"q": {"kernel": normal(0, 3, 8, 8)}, "norm": {name: normal(1, 3, 8)}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    module = "norm.gain" if name == "gain" else "norm"
    params = pj.apply_lora(base, pj.LoraConfig(r=2, target_modules="all-linear"), layout=layout)
    assert set(leaves_of(params)) == {"layers.q.kernel"}
    assert set(weights_of(pj.quantize(base, layout=layout))) == {"layers.q.kernel"}
    with pytest.raises(ValueError, match="is a vector"):
        pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=[module]), layout=layout)
    with pytest.raises(ValueError, match="ambiguous.*or give fn= and args="):
        pj.apply_adapter(base, pj.LNTuningConfig(target_modules=[module]), layout=layout)


def test_who_gave_fn_is_not_told_to_give_it():
    base, x = {"q": {"kernel": normal(0, 8, 8)}, "unused": {"kernel": normal(1, 3, 8, 8)}}, normal(2, 5, 8)
    fn = lambda params, x: x @ params["q"]["kernel"]  # noqa: E731
    with pytest.raises(
        ValueError, match=r"ambiguous: no convention .*, nor does a product in fn=. Write layout="
    ) as error:
        pj.apply_lora(base, pj.LoraConfig(target_modules=["unused"]), fn=fn, args=(x,))
    assert "give fn=" not in str(error.value)
