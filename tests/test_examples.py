"""The examples run, train what they say, and stay short enough to copy; the idioms they warn of do train the base."""

import re
import runpy
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import peft_jax as pj

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ["plain", "linen", "nnx", "equinox"]


@pytest.fixture
def standard():
    """JAX's own settings, as a reader has them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_example_learns_and_merges(name, standard, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    file = EXAMPLES / f"adapt_{name}.py"
    assert len(file.read_text().splitlines()) < 60
    names = runpy.run_path(str(file), run_name="__main__")
    text = capsys.readouterr().out
    (_, _), (before, after) = [map(float, pair) for pair in re.findall(r"loss ([\d.]+) -> ([\d.]+)", text)]
    assert after < before - 0.5
    assert float(re.search(r"differ by at most ([\d.e-]+)", text)[1]) < 1e-4
    trainable, frozen = names["trainable"], names["frozen"]
    share = float(re.search(r"trainable%: ([\d.]+)", text)[1])
    assert 0 < share < 20 and len(jax.tree.leaves(trainable)) % 2 == 0
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trainable)), "some B has not moved"
    assert not {id(leaf) for leaf in jax.tree.leaves(trainable)} & {id(leaf) for leaf in jax.tree.leaves(frozen)}


# ---- Idioms that would train the base: errors, or warned of where a reader of that framework looks


def moved(before, after):
    """Whether any array of the base differs."""
    pairs = zip(jax.tree.leaves(pj.unload(before)), jax.tree.leaves(pj.unload(after)), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


X = jnp.ones((3, 4))


def test_train_state_of_the_whole_tree_is_an_error_and_of_the_twin_leaves_the_base_alone(standard):
    model = linen.Sequential([linen.Dense(8), linen.relu, linen.Dense(2)])
    config = pj.LoraConfig(r=2, target_modules=["layers_0", "layers_2"])
    params = pj.apply_lora(model.init(jax.random.key(0), X), config)
    trainable, frozen = pj.partition(params)
    loss = lambda params: jnp.sum(jnp.sin(pj.adapt(model.apply)(params, X)))  # noqa: E731

    whole = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(loss)(whole.params)
    twin = TrainState.create(apply_fn=model.apply, params=trainable, tx=optax.sgd(0.1))
    grads = jax.grad(lambda t: loss(pj.combine(t, frozen)))(twin.params)
    after = pj.combine(twin.apply_gradients(grads=grads).params, frozen)
    assert not moved(params, after)
    assert (
        np.abs(pj.merge(after)["params"]["layers_0"]["kernel"] - pj.merge(params)["params"]["layers_0"]["kernel"]).max()
        > 0
    )


def test_nnx_optimizer_of_all_params_is_an_error_and_optax_over_the_twin_leaves_the_base_alone(standard):
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model)
    params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["layers.0", "layers.2"]))
    loss = pj.adapt(lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(X))))
    whole = nnx.merge(graph, params)
    nnx.Optimizer(whole, optax.sgd(0.1), wrt=nnx.Param)  # what follows it in every program is nnx.grad
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        nnx.grad(lambda model: loss(nnx.split(model)[1]))(whole)

    trainable, frozen = pj.partition(params)
    grads, tx = jax.grad(lambda t: loss(pj.combine(t, frozen)))(trainable), optax.sgd(0.1)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    assert not moved(params, pj.combine(optax.apply_updates(trainable, updates), frozen))


def test_filter_grad_of_a_whole_equinox_model_trains_the_base_as_the_example_warns(standard):
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    params = pj.apply_lora(model, pj.LoraConfig(r=2, target_modules=["layers.0", "layers.1"]))
    loss = lambda model: jnp.sum(jnp.sin(pj.adapt(lambda model, x: jax.vmap(model)(x))(model, X)))  # noqa: E731
    grads = eqx.filter_grad(loss)(params)
    assert moved(params, eqx.apply_updates(params, grads))

    trainable, frozen = pj.partition(params)
    grads = eqx.filter_grad(lambda t: loss(pj.combine(t, frozen)))(trainable)
    assert not moved(params, pj.combine(eqx.apply_updates(trainable, grads), frozen))


@pytest.mark.parametrize("make", [pj.trainable_mask, pj.trainable_labels])
def test_masks_and_labels_of_the_whole_tree_are_an_error(make, standard):
    """Over the whole tree optax.masked passes raw gradients on to what it masks: it would train the base."""
    params = pj.apply_lora({"a": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(r=2, target_modules=["a"]))
    told = r"is the whole tree.*trainable, frozen = pj.partition\(params\)"
    with pytest.raises(ValueError, match=told):
        make(params)
    with pytest.raises(ValueError, match=told):
        optax.masked(optax.sgd(0.1), make).init(params)
    make(pj.partition(params)[0])


@pytest.mark.parametrize(
    "file", ["README.md", "docs/howto/any_function.md", *(f"examples/adapt_{n}.py" for n in NAMES)]
)
def test_each_place_says_what_not_to_train(file):
    text = " ".join((EXAMPLES.parent / file).read_text().replace("\n# ", " ").split())
    assert re.search("over the whole (tree|model)", text, re.I) and "pj.partition" in text


def run_example(name, monkeypatch, capsys, *options):
    """What an example prints with these options."""
    pytest.importorskip("torch")  # once is enough, and the newest JAX's turn is for what differs there
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The checkpoint in")  # has no head for classes
def test_a_frozen_bert_learns_classes_with_lora_and_with_a_prefix(standard, monkeypatch, capsys):
    options = "--pretraining-steps 20 --steps 80 --classes 3 --length 24".split()
    text = run_example("classify_docstrings", monkeypatch, capsys, *options)
    accuracy = dict(re.findall(r"^(\S.*?) +accuracy ([\d.]+)", text, re.MULTILINE))
    assert list(accuracy) == ["untuned", "LoRA", "P-tuning v2"]
    assert float(accuracy["LoRA"]) > float(accuracy["untuned"]) < float(accuracy["P-tuning v2"])


@pytest.mark.slow
def test_a_frozen_t5_learns_from_a_prompt_what_it_is_asked(standard, monkeypatch, capsys):
    options = "--pretraining-steps 60 --steps 60 --longest 16".split()
    text = run_example("prompt_tune_t5", monkeypatch, capsys, *options)
    (before, after) = map(float, re.findall(r"held-out loss ([\d.]+)", text))
    assert after < before
