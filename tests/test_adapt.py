"""adapt(fn): equal to merging first, in value and gradient, and on the side path where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj


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
IDS = jnp.array([[3, 0], [7, 7]])


def scanned(w, x):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), h.sum()), x, w)


def scanned_with_checkpoint(w, x):
    body = jax.checkpoint(lambda h, layer: (jnp.tanh(h @ layer), None), policy=jax.checkpoint_policies.dots_saveable)
    return jax.lax.scan(body, x, w, reverse=True)[0]


def closed_over(w, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0]


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x)


def branched(w, x):
    return jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w * 2, w)


# name: (function, shape, layout, whether the merged weight is never formed)
CONSTRUCTS = {
    "x @ w": (lambda w, x: x @ w, (8, 8), None, True),
    "w.T": (lambda w, x: x @ w.T, (8, 8), None, True),
    "w @ x": (lambda w, x: w @ x.T, (8, 8), None, True),
    "einsum, weight first": (lambda w, x: jnp.einsum("io,bi->ob", w, x), (8, 8), None, True),
    "heads": (lambda w, x: jnp.einsum("bi,iho->bho", x, w), (8, 2, 6), pj.Layout((), (0,), (1, 2)), True),
    "heads, contracted": (
        lambda w, x: jnp.einsum("bho,hoi->bi", x.reshape(5, 2, 4), w),
        (2, 4, 6),
        pj.Layout((), (0, 1), (2,)),
        True,
    ),
    "batched stack": (lambda w, x: jnp.einsum("bi,lio->lbo", x, w), (3, 8, 6), STACK, True),
    "vmap over a stack": (lambda w, x: jax.vmap(lambda w: x @ w)(w), (3, 8, 6), STACK, True),
    "astype": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (8, 8), None, True),
    "lookup": (lambda w, x: jnp.take(w, IDS, axis=0), (8, 8), None, True),
    "indexing": (lambda w, x: w[IDS], (8, 8), None, True),
    "tied": (lambda w, x: jnp.take(w, IDS, axis=0) @ w.T, (8, 8), None, True),
    "scan over layers": (scanned, (3, 8, 8), STACK, True),
    "scan, checkpoint": (scanned_with_checkpoint, (3, 8, 8), STACK, True),
    "scan, closed over": (closed_over, (8, 8), None, True),
    "fori_loop": (looped, (8, 8), None, True),
    "cond": (branched, (8, 8), None, True),
    "inner jit": (lambda w, x: jax.jit(lambda w: jnp.tanh(x @ w))(w), (8, 8), None, True),
    "grad inside": (lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x), (8, 8), None, True),
    "custom_jvp on activations": (lambda w, x: jax.nn.relu(x @ w), (8, 8), None, True),
    "elementwise": (lambda w, x: x @ (w * 2), (8, 8), None, False),
    "reshape": (lambda w, x: x @ w.reshape(-1, 6), (8, 2, 3), pj.Layout((), (0,), (1, 2)), False),
    "two weights": (lambda w, x: x @ w @ w, (8, 8), None, True),
    "weight times weight": (lambda w, x: x @ (w @ w), (8, 8), None, False),
    "returned": (lambda w, x: (w, x), (8, 8), None, False),
}
construct = pytest.mark.parametrize(("fn", "shape", "layout", "side_path"), CONSTRUCTS.values(), ids=CONSTRUCTS)


@pytest.mark.parametrize("mode", ["eager", "jit", "grad"])
@pytest.mark.parametrize("bits", [None, 8], ids=["float", "int8"])
@construct
def test_equals_merging_first(fn, shape, layout, side_path, bits, mode):
    leaf = make(shape, layout, bits=bits)
    ours, want = pj.adapt(fn), lambda leaf, x: fn(leaf.dense(), x)
    if mode == "grad":
        trainable, frozen = pj.partition(leaf)
        ours, want = (gradient(f, frozen) for f in (ours, want))
        leaf = trainable
    if mode == "jit":
        ours = jax.jit(ours)
    got, want, base = ours(leaf, X), want(leaf, X), fn(pj.merge(leaf.base), X) if mode != "grad" else None
    # bfloat16 products round to 8 bits of mantissa, merged and unmerged at different places.
    tolerance = 0.05 if fn is CONSTRUCTS["astype"][0] else 1e-5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))
    if mode != "grad":
        alive = [not np.allclose(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(base), strict=True)]
        assert any(alive), "the adapter is dead"


def gradient(fn, frozen):
    def loss(trainable, x):
        out = fn(pj.combine(trainable, frozen), x)
        return sum(jnp.sum(jnp.sin(array.astype(jnp.float32))) for array in jax.tree.leaves(out))

    return jax.grad(loss, argnums=(0, 1))


def shapes_made(jaxpr):
    """Shapes of everything that a jaxpr computes, nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars if eqn.primitive.name not in ("transpose", "jit", "scan"))
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from shapes_made(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(
    "name", [name for name, row in CONSTRUCTS.items() if name not in ("astype", "two weights", "tied")]
)
def test_forms_a_merged_weight_exactly_where_there_is_no_side_path(name):
    fn, shape, layout, side_path = CONSTRUCTS[name]
    shape = tuple(13 if n == 8 else n for n in shape)  # sizes that no activation has
    x = normal(1, 5, 8) if "heads, contracted" == name else normal(1, 5, 13)
    leaf = make(shape, layout)
    trainable, frozen = pj.partition(leaf)

    def loss(trainable):
        return sum(jnp.sum(array) for array in jax.tree.leaves(pj.adapt(fn)(pj.combine(trainable, frozen), x)))

    made = set(shapes_made(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    inner = shape[1:] if layout is STACK and "scan" in name else shape
    formed = shape in made or inner in made
    assert formed != side_path


def test_without_weights_it_is_the_function_itself():
    calls = []
    assert pj.adapt(lambda w: calls.append(w) or w)("not an array") == "not an array" and len(calls) == 1


def test_other_arguments_stay_static():
    leaf = make((8, 8))
    out = pj.adapt(lambda w, x, times, *, name: (x @ w * times, {name: x}))(leaf, X, 2, name="x")
    np.testing.assert_allclose(out[0], X @ leaf.dense() * 2, atol=1e-4)
    assert list(out[1]) == ["x"]


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
