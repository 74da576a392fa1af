"""Several adapters in one batch, every row as if it were alone, for every method; and adapters that count more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS, stacked_configs

import peft_jax as pj
from peft_jax.adapters.per_row import TOGETHER
from peft_jax.core.adapted_tree import map_adapted

TARGETS = ["up", "down"]
CONFIGS = {
    **stacked_configs(TARGETS),
    "another LORA": pj.LoraConfig(r=5, lora_alpha=2, use_rslora=True, target_modules=["up"]),
    "LORA of an embedding": pj.LoraConfig(r=2, target_modules=["embed", "down"]),
    "saved": pj.LoraConfig(r=2, target_modules=["up"], modules_to_save=["down", "norm"]),
    "biases": pj.LoraConfig(r=2, target_modules=["up"], bias="all"),
}
LAYOUT = {
    r".*kernel": pj.Layout((0,), (1,), (2,)),
    r".*(bias|scale)": pj.Layout((0,), (), (1,)),
}
IDS = jnp.array([[1, 3, 0], [3, 2, 1], [0, 0, 5], [4, 1, 2], [3, 3, 3]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def base(bits=None):
    up = {"kernel": 0.3 * normal(0, 2, 8, 12), "bias": 0.5 * normal(3, 2, 12)}
    kernels = {"up": up, "down": {"kernel": 0.3 * normal(1, 2, 12, 8)}, "norm": {"scale": 1 + 0.3 * normal(4, 2, 8)}}
    tree = {"embed": {"embedding": normal(2, 6, 8)}, "layers": kernels}
    return pj.quantize(tree, target_modules=TARGETS, layout=LAYOUT) if bits else tree


def model(params, ids):
    """A scanned model with a tied head: lookups, products and products with a transpose, a bias and a scale."""
    table = params["embed"]["embedding"]

    def layer(h, kernels):
        inner = (h * kernels["norm"]["scale"][None, None]) @ kernels["up"]["kernel"]
        return h + jax.nn.tanh(inner + kernels["up"]["bias"][None, None]) @ kernels["down"]["kernel"], None

    h, _ = jax.lax.scan(layer, jnp.take(table, ids, axis=0), params["layers"])
    return h @ table.T


def with_adapters(params, names):
    for i, name in enumerate(names):
        params = pj.apply_adapter(params, CONFIGS[name], adapter_name=name, layout=LAYOUT)
        one = pj.set_adapter(params, name)
        trainable, frozen = pj.partition(one)
        leaves, treedef = jax.tree.flatten(trainable)
        leaves = [leaf + 0.3 * normal(7 * i + n, *leaf.shape) for n, leaf in enumerate(leaves)]
        params = pj.combine(jax.tree.unflatten(treedef, leaves), frozen)
    return params


def alone(params, names):
    run = pj.adapt(model)
    trees = {name: pj.set_adapter(params, name) for name in set(names) - {"__base__"}}
    trees["__base__"] = pj.disable_adapter(params)
    return jnp.concatenate([run(trees[name], IDS[i : i + 1]) for i, name in enumerate(names)])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("other", [name for name in CONFIGS if name != "LORA"])
def test_a_row_has_the_numbers_of_its_adapter_alone(other, bits):
    params = with_adapters(base(bits), ["LORA", other])
    names = [other, "LORA", "__base__", "LORA", other]
    want = alone(params, names)
    close(jax.jit(pj.adapt(model))(pj.with_adapter_rows(params, names), IDS), want)
    plain = pj.adapt(model)(pj.disable_adapter(params), IDS)
    moved = np.abs(want - plain).max(axis=(1, 2))
    assert (moved[[0, 1, 3, 4]] > 1e-2).all() and moved[2] < 1e-5


def test_many_unlike_adapters_in_one_batch_and_other_names_compile_nothing():
    names = ["OFT", "LORA", "another LORA", "__base__", "HIRA"]
    params = with_adapters(base(), ["LORA", "OFT", "HIRA", "another LORA"])
    run = jax.jit(pj.adapt(model))
    for order in (names, names[::-1]):
        close(run(pj.with_adapter_rows(params, order), IDS), alone(params, order))
    assert run._cache_size() == 1


@pytest.mark.parametrize("tokens", [2, 6])
def test_few_factors_are_all_multiplied_and_many_gathered(tokens):
    """The same numbers either way; and those of an adapter that are not finite stay in its own rows."""
    params = with_adapters(base(), ["LORA", "another LORA", "saved"])
    names = ["another LORA", "LORA", "__base__", "saved", "LORA"]
    rows = pj.with_adapter_rows(params, names)
    kernel = pj.adapt(lambda params, x: x @ params["layers"]["up"]["kernel"][0])
    text = jax.jit(kernel).lower(rows, normal(3, 5, tokens, 8)).as_text()
    is_gathered = 3 * tokens > TOGETHER
    assert ("tensor<5x8x5xf32>" in text) == is_gathered  # a first factor for each row
    ids = jnp.tile(IDS, (1, 2))[:, :tokens]
    trees = {name: pj.set_adapter(params, name) for name in ("LORA", "another LORA", "saved")}
    trees["__base__"] = pj.disable_adapter(params)
    run = pj.adapt(model)
    want = [run(trees[name], ids[row : row + 1])[0] for row, name in enumerate(names)]
    close(run(rows, ids), jnp.stack(want))
    trainable, frozen = pj.partition(trees["LORA"])
    broken = pj.combine(jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), trainable), frozen)
    found = run(pj.with_adapter_rows(broken, names), ids)
    for row, name in enumerate(names):
        if name == "LORA":
            assert jnp.isnan(found[row]).all()
        else:
            close(found[row], want[row])


def test_gathered_factors_make_no_second_product_with_the_base():
    params = with_adapters(base(), ["LORA", "another LORA"])
    names = ["LORA", "another LORA", "LORA", "__base__", "LORA"]
    text = (
        jax.jit(pj.adapt(lambda p, x: x @ p["layers"]["up"]["kernel"][0]))
        .lower(pj.with_adapter_rows(params, names), normal(3, 5, 2, 8))
        .as_text()
    )
    assert text.count("stablehlo.dot_general") == 3


def test_unlike_methods_nested_compute_one_after_the_other():
    """All active: each method on what the ones before it made of the base."""
    for names in (["LORA", "OFT", "LOHA"], ["LOKR", "LORA", "OFT"], ["LOHA", "ADALORA", "LORA"]):
        params = with_adapters(base(), names)
        kernel = base()["layers"]["up"]["kernel"]
        leaf = params["layers"]["up"]["kernel"]
        chain = []
        while hasattr(leaf, "tag"):
            chain.append(leaf)
            leaf = leaf.base
        for node in chain[::-1]:
            kernel = jax.vmap(node.tag.config.merge)(node.params, node.state, kernel)
        everything = activate(params)
        close(pj.merge(everything)["layers"]["up"]["kernel"], kernel)
        close(pj.adapt(model)(everything, IDS), model(pj.merge(everything), IDS))
        jax.tree.map(np.testing.assert_array_equal, pj.unload(everything), base())
        without = pj.delete_adapter(everything, names[1])
        close(pj.adapt(model)(without, IDS), model(pj.merge(without), IDS))
        assert np.abs(pj.merge(without)["layers"]["up"]["kernel"] - kernel).max() > 1e-2


def activate(params):
    """All adapters of the tree active."""
    return map_adapted(lambda _, leaf: dataclasses.replace(leaf, active=True), params)


def test_rows_of_a_model_are_pefts(tiny_llama, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(0)
    options = {"init_lora_weights": False, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, **options), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=3, **options))
    theirs.save_pretrained(tmp_path)
    ours = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    for name in ("one", "two"):
        ours = pj.PeftModel.from_pretrained(ours, tmp_path / name, adapter_name=name)
    ids, names = np.array([[5, 6, 7], [1, 2, 3], [9, 9, 4]]), ["two", "__base__", "one"]
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(ids), adapter_names=names).logits.numpy()
    mixed = pj.with_adapter_rows(ours, names)
    close(mixed(ids).logits, want)
    tokens = mixed.generate(ids, max_new_tokens=4)
    for i, name in enumerate(names):
        one = ours.disable_adapter() if name == "__base__" else ours.set_adapter(name)
        np.testing.assert_array_equal(tokens[i], one.generate(ids[i : i + 1], max_new_tokens=4)[0])


def test_rows_of_a_model_have_norms_and_biases_of_their_own():
    config = pj.models.BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    params = pj.AutoModelForSequenceClassification.from_config(config)
    configs = {
        "norms": pj.LNTuningConfig(target_modules=["LayerNorm"]),
        "biases": pj.IA3Config(),
        "more": pj.BeftConfig(),
    }
    for name, method in configs.items():
        params = pj.get_peft_model(params, method, adapter_name=name)
        trainable, frozen = pj.partition(params)
        params = pj.combine(jax.tree.map(lambda leaf: leaf + normal(5, *leaf.shape), trainable), frozen)
    names = ["more", "norms", "__base__", "biases", "norms"]
    ids = np.arange(20).reshape(5, 4)
    got = pj.with_adapter_rows(params, names)(ids).logits
    for i, name in enumerate(names):
        one = params.disable_adapter() if name == "__base__" else params.set_adapter(name)
        close(got[i], one(ids[i : i + 1]).logits[0])
    assert np.abs(got - params.disable_adapter()(ids).logits).max(axis=1)[[0, 1, 3, 4]].min() > 1e-2


def test_what_cannot_differ_by_row_is_named():
    params = with_adapters(base(), ["LORA"])
    rows = pj.with_adapter_rows(params, ["LORA"] * 5)
    with pytest.raises(ValueError, match=r"No adapters are named \['b'\]. Found: \['LORA'\], and '__base__'"):
        pj.with_adapter_rows(params, ["b"])
    with pytest.raises(ValueError, match=r"inputs of shape \(2, 8\) where each of 5 rows"):
        pj.adapt(lambda params: normal(0, 2, 8) @ params["layers"]["up"]["kernel"][0])(rows)
    with pytest.raises(
        ValueError, match="Primitive 'tanh' takes a weight that has to be merged. Its rows have adapters"
    ):
        pj.adapt(lambda params: jnp.tanh(params["layers"]["up"]["kernel"]))(rows)
    with pytest.raises(ValueError, match="No adapter is named 'default'"):
        pj.get_peft_model_state_dict(rows)
    biased = {"up": {"kernel": normal(0, 4, 4), "bias": jnp.zeros(4)}}
    biased = pj.apply_adapter(biased, pj.IA3Config(target_modules=["up"], feedforward_modules=[]))
    biased = pj.with_adapter_rows(biased, ["default"] * 4)
    for use in (lambda params: jnp.exp(params["up"]["bias"]), lambda params: params["up"]["bias"] + jnp.ones(4)):
        with pytest.raises(ValueError, match="Its rows have adapters of their own .* add or multiply rows by a vector"):
            pj.adapt(use)(biased)
    assert not jax.tree.leaves(pj.partition(rows)[0])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.scales])
def test_a_scaled_adapter_counts_as_much_more(name):
    params = pj.set_adapter(with_adapters(base(), sorted({"LORA", "HIRA", name})), name)
    plain = pj.merge(base())
    once, twice = (pj.merge(one) for one in (params, pj.scale_adapter(params, 2.5)))
    jax.tree.map(lambda b, o, t: close(t - b, 2.5 * (o - b)), plain, once, twice)
    same = pj.scale_adapter(params, 2.5, "HIRA" if name != "HIRA" else "LORA")
    jax.tree.map(np.testing.assert_array_equal, pj.merge(same), once)


def test_an_adapter_that_is_scaled_is_there():
    params = with_adapters(base(), ["OFT", "LORA"])
    with pytest.raises(ValueError, match="No adapter is named 'x'. Found: .*'LORA', 'OFT'"):
        pj.scale_adapter(params, 2, "x")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.scales])
def test_what_cannot_be_scaled_is_named(name):
    params = with_adapters(base(), [name, "LORA"])
    with pytest.raises(ValueError, match=rf"has a scale: found \['{name}'\]"):
        pj.scale_adapter(params, 2, name)
