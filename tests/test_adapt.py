"""adapt(fn) on whole models: nested adapters, cost, frameworks. Construct by construct it is tested elsewhere."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.adapt.rules import RULES


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
@pytest.mark.parametrize("scanned", [False, True])
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
    products = [eqn.params["jaxpr"] for eqn in calls_in(traced.jaxpr) if "jaxpr" in eqn.params]
    assert len(products) == 5 and len(set(map(id, products))) == 1, "each layer calls one and the same product"
    np.testing.assert_allclose(pj.adapt(fn)(layers, X), fn(pj.merge(layers), X), rtol=0, atol=1e-5)


def calls_in(jaxpr):
    """The equations of what `adapt` puts into a program that is being traced: one call."""
    (call,) = (eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "adapted")
    return call.params["jaxpr"].jaxpr.eqns


@pytest.mark.parametrize("dropout, products", [(0.0, 8), (0.5, 10)])
def test_products_of_one_input_begin_together(dropout, products):
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

    text = jax.jit(pj.adapt(fn)).lower(params, X).as_text()
    assert text.count("stablehlo.dot_general") == products
    trainable, frozen = pj.partition(params)
    each = {name: pj.adapt(lambda params, x, name=name: jnp.sin(x @ params[name]["kernel"])) for name in "qkvw"}
    ways = pj.adapt(fn), lambda params, x: [one(params, x) for one in each.values()]
    got, want = (
        jax.value_and_grad(lambda t, x, way=way: sum(map(jnp.sum, way(pj.combine(t, frozen), x))), (0, 1))(trainable, X)
        for way in ways
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


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
