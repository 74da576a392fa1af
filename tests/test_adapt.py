"""adapt(fn) on whole models: nested adapters, cost, frameworks. Construct by construct it is tested elsewhere."""

import functools
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.adapt.rules import RULES
from peft_jax.methods.base import by_name, names


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def make(shape, layout=None, *, name="kernel", bits=None, r=3):
    tree = {"layers": {"dense": {name: normal(0, *shape)}}}
    table = {".*": layout} if layout else None
    if bits:
        tree = pj.quantize(tree, bits, layout=table)
    config = pj.LoraConfig(r=r, target_modules=["dense"], init_lora_weights=False)
    return pj.apply_lora(tree, config, layout=table)["layers"]["dense"][name]


STACK = pj.Layout((0,), (1,), (2,))
X = normal(1, 5, 8)


def test_nested_adapters_add_up_and_switch():
    tree = {"dense": {"kernel": normal(0, 8, 8)}}
    config = pj.LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False)
    both = pj.apply_lora(pj.apply_lora(tree, config, adapter_name="a"), config, adapter_name="b", key=jax.random.key(9))
    fn = pj.adapt(lambda params, x: x @ params["dense"]["kernel"])
    leaf = both["dense"]["kernel"]
    delta = {
        name: node.params["lora_A"] @ node.params["lora_B"] * 4 for name, node in {"b": leaf, "a": leaf.base}.items()
    }
    base = tree["dense"]["kernel"]
    np.testing.assert_allclose(fn(both, X), X @ (base + delta["a"] + delta["b"]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(fn(pj.set_adapter(both, "a"), X), X @ (base + delta["a"]), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(fn(pj.disable_adapter(both), X), X @ base)
    np.testing.assert_allclose(fn(pj.delete_adapter(both, "a"), X), X @ (base + delta["b"]), rtol=0, atol=1e-4)
    assert pj.unload(both)["dense"]["kernel"] is base
    with pytest.raises(ValueError, match=r"No adapter is named 'c'. Found: \['a', 'b'\]"):
        pj.set_adapter(both, "c")


@pytest.mark.usefixtures("optimizing_compiler")
def test_flops_and_memory_equal_hand_written_lora():
    w, a, b = normal(0, 6, 64, 64), normal(1, 6, 64, 4), normal(2, 6, 4, 64)
    x = normal(3, 32, 64)
    leaf = make((6, 64, 64), STACK, r=4)

    def by_hand(ab, w, scale, x):
        def layer(h, p):
            w, a, b, s = p
            return jnp.tanh(h @ w + (h @ a) * s @ b), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (w, *ab, scale))[0])

    def plain(w, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w)[0])

    trainable, frozen = pj.partition(leaf)
    ours = jax.jit(jax.grad(lambda t, f, x: pj.adapt(plain)(pj.combine(t, f), x))).lower(trainable, frozen, x).compile()
    hand = jax.jit(jax.grad(by_hand)).lower((a, b), w, jnp.ones(6), x).compile()
    merging = (
        jax.jit(jax.grad(lambda t, f, x: plain(pj.combine(t, f).dense(), x))).lower(trainable, frozen, x).compile()
    )
    flops = [program.cost_analysis()["flops"] for program in (ours, hand, merging)]
    memory = [program.memory_analysis().temp_size_in_bytes for program in (ours, hand, merging)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01) and flops[2] > 1.2 * flops[0]
    assert memory[0] <= memory[1] * 1.01 and memory[2] > 1.2 * memory[0]


@pytest.mark.usefixtures("optimizing_compiler")
@pytest.mark.parametrize("scanned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_decoder_costs_what_lora_by_hand_costs(scanned):
    """On the decoder of benchmarks/adapt_overhead.py, of which this is the part that no clock decides."""
    bench = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "adapt_overhead.py"))
    settings = bench["Settings"](layers=2, dim=64, batch=2, length=32, rank=4)
    ways, x = bench["ways"](settings, scanned)
    programs = bench["programs"](ways, x)
    values = {way.name: float(programs[way.name](way.trained, way.rest, x)[0]) for way in ways}
    assert values["adapt"] == pytest.approx(values["by hand"], abs=0.02)  # a sum of 4096 sines
    assert values["adapt"] == pytest.approx(values["merging"], abs=0.02)
    assert abs(values["adapt"] - values["unwrapped"]) > 1
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    assert flops["adapt"] == pytest.approx(flops["by hand"], rel=0.01) and flops["merging"] > 1.05 * flops["adapt"]
    assert memory["adapt"] <= 1.01 * memory["by hand"]


def test_a_deeper_scan_is_no_larger_program():
    bench = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "adapt_overhead.py"))

    def lines(layers):
        ways, x = bench["ways"](bench["Settings"](layers=layers, dim=64, batch=2, length=8, rank=4), scanned=True)
        (ours,) = (way for way in ways if way.name == "adapt")
        return jax.jit(jax.grad(ours.loss)).lower(ours.trained, ours.rest, x).as_text().count("\n")

    assert lines(2) == lines(6)


def test_runs_on_flax_nnx_and_linen_without_a_change_to_the_model():
    from flax import linen, nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    dense = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(2)])
    x = normal(3, 5, 4)
    cases = [
        (lambda params, x: nnx.merge(graph, params)(x), state, ["up", "down"]),
        (dense.apply, dense.init(jax.random.key(0), x), ["layers_0", "layers_2"]),
    ]
    for fn, params, targets in cases:
        config = pj.LoraConfig(r=2, target_modules=targets, bias="lora_only", init_lora_weights=False)
        adapted = pj.apply_lora(params, config)
        trainable, frozen = pj.partition(adapted)
        assert len(jax.tree.leaves(trainable)) == 6  # A, B and bias of two layers
        merged = fn(pj.merge(adapted), x)
        np.testing.assert_allclose(pj.adapt(fn)(pj.combine(trainable, frozen), x), merged, rtol=0, atol=1e-5)
        assert not np.allclose(merged, fn(params, x))


def test_of_many_like_layers_one_is_traced(monkeypatch):
    """Tracing has to cost little beside the function's own, however many layers are not in a scan."""
    calls = []

    def counted(*args):
        calls.append(args[1].primitive.name)
        return rule(*args)

    rule = RULES["dot_general"]
    monkeypatch.setitem(RULES, "dot_general", counted)
    layers = [make((8, 8)) for _ in range(5)]

    def fn(layers, x):
        for w in layers:
            x = jnp.tanh(x @ w)
        return x

    traced = jax.make_jaxpr(pj.adapt(fn))(layers, X)
    assert calls == ["dot_general"]
    products = [eqn.params["jaxpr"] for eqn in calls_in(traced.jaxpr) if eqn.params.get("name") == "_use_weight"]
    assert len(products) == 5 and len(set(map(id, products))) == 1, "each layer calls one and the same product"
    np.testing.assert_allclose(pj.adapt(fn)(layers, X), fn(pj.merge(layers), X), rtol=0, atol=1e-5)


def products_in(jaxpr, seen):
    """The number of products in a jaxpr and in the programs that it calls, each of them counted once."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "dot_general"
        inner = getattr(eqn.params.get("jaxpr"), "jaxpr", None)
        if inner is not None and id(inner) not in seen:
            seen[id(inner)] = inner
            found += products_in(inner, seen)
    return found


def test_of_many_like_layers_one_is_differentiated():
    """What a layer computes between its weights is one program too, which all layers call, forward and backward."""

    def products(layers, compares):
        tree = [{name: make((8, 8)) for name in "qkvo"} for _ in range(layers)]

        def fn(tree, x):
            for layer in tree:
                q, k, v = (x @ layer[name] for name in "qkv")
                x = x + jnp.tanh(jax.nn.softmax(q @ k.T / 64) @ v @ layer["o"] / 16) / 8
            return x

        trainable, frozen = pj.partition(tree)

        def loss(run, trainable):
            return jnp.sum(jnp.sin(run(pj.combine(trainable, frozen), X)))

        ours = jax.grad(functools.partial(loss, pj.adapt(fn)))
        if compares:
            merging = jax.grad(functools.partial(loss, lambda tree, x: fn(pj.merge(tree), x)))
            got, want = (jax.tree.leaves(jax.jit(gradient)(trainable)) for gradient in (ours, merging))
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
        return products_in(jax.make_jaxpr(ours)(trainable).jaxpr, {})

    assert products(5, compares=False) == products(3, compares=True)


def test_parts_that_differ_in_a_number_or_a_name_are_no_copies_of_each_other():
    numbers = (0.0, -0.0, 1.0, 0.0)

    def fn(layers, x):
        signs = []
        for number, w in zip(numbers, layers, strict=True):
            with jax.named_scope(f"scope{len(signs)}"):
                x = jnp.tanh(x @ w)
                signs.append(jax.lax.div(1.0, jax.lax.mul(jnp.abs(x[0, 0]), number)))
        return jnp.stack(signs)

    layers = [make((8, 8)) for _ in numbers]
    compiled = jax.jit(pj.adapt(fn))
    got = compiled(layers, X)
    np.testing.assert_allclose(got, fn(pj.merge(layers), X), rtol=1e-5)
    assert got[0] == got[3] == np.inf and got[1] == -np.inf
    text = compiled.lower(layers, X).as_text(debug_info=True)
    assert all(f"scope{i}" in text for i in range(4))


def calls_in(jaxpr):
    """The equations of what `adapt` puts into a program that is being traced: one call."""
    (call,) = (eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "adapted")
    return call.params["jaxpr"].jaxpr.eqns


@pytest.mark.parametrize("dropout, products", [(0.0, 8), (0.5, 10)])
def test_products_of_one_input_share_their_first_product(dropout, products):
    """Four bases, three second factors, and one product with the first factors of all three.

    With dropout each of them has inputs of its own, and a product of its own.
    """
    tree = {name: {"kernel": normal(i, 8, 4 + i)} for i, name in enumerate("qkvw")}
    config = pj.LoraConfig(
        r=2, rank_pattern={"k": 3}, target_modules=["q", "k", "v"], lora_dropout=dropout, init_lora_weights=False
    )
    params = pj.apply_lora(tree, config)
    params = pj.with_dropout(params, jax.random.key(0)) if dropout else params

    def fn(params, x):
        return [jnp.sin(x @ params[name]["kernel"]) for name in "qkvw"]

    assert count_products(pj.adapt(fn), params, X) == products
    trainable, frozen = pj.partition(params)
    each = {name: pj.adapt(lambda params, x, name=name: jnp.sin(x @ params[name]["kernel"])) for name in "qkvw"}
    ways = pj.adapt(fn), lambda params, x: [one(params, x) for one in each.values()]
    got, want = (
        jax.value_and_grad(lambda t, x, way=way: sum(map(jnp.sum, way(pj.combine(t, frozen), x))), (0, 1))(trainable, X)
        for way in ways
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


def project(params, x, names="qkv"):
    return [x @ params[name]["kernel"] for name in names]


def count_products(fn, *args):
    """The products of a program, those of a part as often as it is called."""
    functions = re.split(r"\n  func\.func ", jax.jit(fn).lower(*args).as_text())[1:]
    texts = {re.search(r"@([\w.]+)\(", text)[1]: text for text in functions}

    def products_of(name):
        called = re.findall(r"call @([\w.]+)\(", texts[name])
        return texts[name].count("stablehlo.dot_general") + sum(map(products_of, called))

    return products_of("main")


def products_saved(params):
    """By how many products q, k and v together need fewer than each by itself; the numbers are the same."""
    each = [
        count_products(pj.adapt(lambda params, x, name=name: project(params, x, name)), params, X) for name in "qkv"
    ]
    got, want = pj.adapt(project)(params, X), project(pj.merge(params), X)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    return sum(each) - count_products(pj.adapt(project), params, X)


TREE = {name: {"kernel": normal(i, 8, 4 + i)} for i, name in enumerate("qkv")}
LORA = pj.LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False)
FIRST = {"LORA": [LORA, LORA.replace(use_dora=True), LORA.replace(use_rslora=True, lora_alpha=3)]}
OFT = pj.OFTConfig(target_modules=["q"], oft_block_size=4, init_weights=False)


def test_every_method_with_a_first_factor_shares_its_product():
    declaring = {name for name in names() if getattr(by_name(name), "first", None) is not None}
    assert declaring == FIRST.keys(), "a method that declares its first factor needs a config here"
    for configs in FIRST.values():
        for config in configs:
            assert products_saved(pj.apply_adapter(TREE, config)) == 2, config


def test_adapters_in_each_other_share_the_first_products_of_all():
    """They have the same role on the same leaf, and each gets its own part; the base's product is no part of it."""
    params = pj.apply_lora(TREE, LORA, adapter_name="inner")
    params = pj.apply_lora(params, LORA.replace(r=3), adapter_name="outer", key=jax.random.key(7))
    assert products_saved(params) == 5
    assert products_saved(pj.set_adapter(params, "inner")) == products_saved(pj.set_adapter(params, "outer")) == 2


@pytest.mark.parametrize("outer, saved", [(OFT, 1), (OFT.replace(target_modules=["q", "k", "v"]), 0)])
def test_a_shared_first_product_is_not_that_of_an_input_changed_since(outer, saved):
    """OFT rotates the inputs of q before LoRA meets them, or those of all three.

    The shared product serves k and v, or nobody, and then it is not in the program.
    """
    params = pj.apply_adapter(pj.apply_lora(TREE, LORA), outer, adapter_name="outer")
    trainable, frozen = pj.partition(params)
    trainable = jax.tree.map(lambda array: array + 0.5 * normal(5, *array.shape), trainable)
    assert products_saved(pj.combine(trainable, frozen)) == saved


def test_an_adapter_under_one_with_dropout_shares_the_product_of_the_plain_input():
    params = pj.apply_lora(TREE, LORA, adapter_name="inner")
    params = pj.apply_lora(params, LORA.replace(lora_dropout=0.5), adapter_name="outer")
    params = pj.with_dropout(params, jax.random.key(2))
    assert count_products(pj.adapt(project), params, X) == 3 + 1 + 3 + 2 * 3  # bases, shared, second factors, outer
    each = [pj.adapt(lambda params, x, name=name: project(params, x, name))(params, X)[0] for name in "qkv"]
    for got, want in zip(pj.adapt(project)(params, X), each, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_product_of_a_changed_first_factor_is_an_error(monkeypatch):
    """An array that a method changed has no shared product; a single weight computes it, so that nothing else tells."""

    def apply(self, params, state, base, x, product):
        changed = {**params, "lora_A": params["lora_A"].astype(jnp.float16)}
        return product.up(product.down_by_role(x, changed, "lora_A"), params["lora_B"])

    monkeypatch.setattr(pj.LoraConfig, "apply", apply)
    with pytest.raises(ValueError, match=r"got another array as 'lora_A'.*Write product.down\(x, array\)"):
        pj.adapt(project)(pj.apply_lora(TREE, LORA), X)


def test_what_is_under_a_shared_product_stays_a_plain_product():
    """EVA's observer notes the inputs of plain products, and a copy that is trained whole has no first factor."""
    adapted = pj.apply_lora(TREE, LORA)
    eva = LORA.replace(init_lora_weights="eva")
    params = pj.apply_lora_from_data(adapted, eva, [X], fn=project, adapter_name="second")
    alone = pj.apply_lora_from_data(TREE, eva, [X], fn=project)
    for name in "qkv":
        got, want = (tree[name]["kernel"].params["lora_A"] for tree in (params, alone))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    whole = pj.apply_lora(TREE, LORA.replace(target_modules=["v"], modules_to_save=["q"]), adapter_name="whole")
    assert products_saved(pj.apply_lora(whole, LORA, adapter_name="second")) == 3


def test_scopes_of_the_users_program_stay_in_the_compiled_one():
    def fn(w, x):
        with jax.named_scope("attention"):
            return x @ w

    assert "attention" in jax.jit(pj.adapt(fn)).lower(make((8, 8)), X).as_text(debug_info=True)


def test_without_jit_there_is_no_call():
    w = make((8, 8))
    with jax.disable_jit():
        traced = jax.make_jaxpr(pj.adapt(jnp.matmul))(X, w)
        y = pj.adapt(jnp.matmul)(X, w)
    assert not any("jaxpr" in eqn.params for eqn in traced.eqns)
    np.testing.assert_allclose(y, X @ w.dense(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("axes", ["BTD,DNH->BTNH", "BTNH,NHD->BTD"])
def test_products_keep_the_axes_that_a_program_has_for_inputs_and_outputs(axes, bits):
    """A TPU's compiler copies arrays whose axes are joined between the products and the sum of their results."""
    sizes = {"B": 2, "T": 3, "D": 4, "N": 5, "H": 7}
    of_x, of_w = axes.partition("->")[0].split(",")
    x, w = normal(0, *(sizes[axis] for axis in of_x)), normal(1, *(sizes[axis] for axis in of_w))

    def fn(params, x):
        return jnp.einsum(axes, x, params["kernel"])

    params = {"kernel": w}
    if bits:
        params = pj.quantize(params, target_modules=["kernel"], fn=fn, args=(x,))
    config = pj.LoraConfig(r=2, target_modules=["kernel"], init_lora_weights=False)
    trainable, frozen = pj.partition(pj.apply_lora(params, config, fn=fn, args=(x,)))
    adapted = pj.adapt(fn)

    def loss(trainable, frozen, x):
        return jnp.sum(adapted(pj.combine(trainable, frozen), x) ** 2)

    text = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).as_text()
    computed = re.findall(r"stablehlo\.(?:add|multiply|dot_general) .*tensor<([\dx]*)\w+>$", text, re.M)
    assert len(computed) > 6
    joined = str(sizes["N"] * sizes["H"])
    assert not [shape for shape in computed if joined in shape.split("x")]
