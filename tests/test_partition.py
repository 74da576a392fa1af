"""Twins, masks and labels, with optax over the trainable twin."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import peft_jax as pj


def tree():
    return {
        "a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "b": [jnp.ones(3), None],
        "c": ({"kernel": jnp.ones((4, 2))},),
    }


def adapted():
    return pj.apply_lora(tree(), pj.LoraConfig(r=2, target_modules=["a"], bias="all", modules_to_save=["c.0"]))


def test_combine_is_the_inverse_with_the_same_arrays():
    params = adapted()
    trainable, frozen = pj.partition(params)
    again = pj.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    assert {leaf.shape for leaf in jax.tree.leaves(trainable)} == {(4, 2), (2, 4), (4,)}
    assert len(jax.tree.leaves(trainable)) == 4  # lora_A, lora_B, the bias and the saved kernel
    assert again["b"][1] is None


def test_labels_name_roles():
    labels = pj.trainable_labels(pj.partition(adapted())[0])
    assert sorted(jax.tree.leaves(labels)) == ["bias", "lora_A", "lora_B", "modules_to_save"]
    assert jax.tree.structure(labels) == jax.tree.structure(pj.partition(adapted())[0])


def test_masks_select_roles_and_refuse_unknown_ones():
    trainable, _ = pj.partition(adapted())
    assert all(jax.tree.leaves(pj.trainable_mask(trainable)))
    assert sum(jax.tree.leaves(pj.trainable_mask(trainable, roles=("lora_B", "bias")))) == 2
    with pytest.raises(ValueError, match=r"Roles \['lora_C'\] name no trainable array. Found: \['bias', 'lora_A'"):
        pj.trainable_mask(trainable, roles=("lora_C",))


def test_optax_over_the_trainable_twin_moves_what_it_should():
    params = adapted()
    trainable, frozen = pj.partition(params)
    rates = {"lora_A": 1.0, "lora_B": 16.0, "bias": 0.0, "modules_to_save": 2.0}
    tx = optax.partition({role: optax.sgd(rate) for role, rate in rates.items()}, pj.trainable_labels)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable)
    moved = pj.trainable_labels(trainable)
    for role, update in zip(jax.tree.leaves(moved), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(update, -rates[role] * np.ones_like(update))


def test_inactive_and_frozen_adapters_are_not_trained():
    params = adapted()
    assert not jax.tree.leaves(pj.partition(pj.disable_adapter(params))[0])
    frozen = pj.apply_lora(tree(), pj.LoraConfig(target_modules=["a"], inference_mode=True))
    assert not jax.tree.leaves(pj.partition(frozen)[0])


def test_twins_of_two_trees_do_not_combine():
    other = pj.apply_lora(tree(), pj.LoraConfig(r=2, target_modules=["c.0"]))
    with pytest.raises(ValueError):
        pj.combine(pj.partition(other)[0], pj.partition(adapted())[1])


def test_names_and_descriptive_fields_stay_out_of_the_structure():
    one, two = (
        pj.apply_lora(tree(), pj.LoraConfig(r=2, target_modules=["a"], base_model_name_or_path=name), adapter_name=name)
        for name in ("one", "two")
    )
    assert jax.tree.structure(one) == jax.tree.structure(two)
    # Names come back from the frozen twin, which does not pass through compiled programs.
    step = jax.jit(lambda trainable: jax.tree.map(lambda array: array + 1, trainable))
    step(pj.partition(one)[0])
    trainable, frozen = pj.partition(two)
    assert "two" in pj.summary(pj.combine(step(trainable), frozen))


def test_summary_counts_as_peft_does():
    text = pj.summary(adapted())
    # r * (in + out) + bias + saved kernel, over these and the base's 4 * 4 + 4 + 3 + 4 * 2
    assert text.endswith("trainable params: 28 || all params: 59 || trainable%: 47.4576")
    assert "a.kernel" in text and "modules_to_save" in text


def nnx_state():
    return nnx.split(
        nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
    )[1]


# name: (tree, target); functions, None and state that is no parameter are leaves of some
TREES = {
    "dictionary": lambda: ({"a": {"kernel": jnp.ones((4, 4)), "bias": None}, "n": 3}, "a"),
    "tuples and lists": lambda: ((jnp.ones((4, 4)), [None, (jnp.ones(2),)]), "0"),
    "linen": lambda: (linen.Dense(3).init(jax.random.key(0), jnp.ones((1, 4))), "params"),
    "NNX state": lambda: (nnx_state(), "layers.0"),
    "Equinox module": lambda: (eqx.nn.MLP(4, 5, 8, 1, key=jax.random.key(0)), "layers.1"),
    "one array": lambda: (jnp.ones((4, 4)), ".*"),
}


@pytest.mark.parametrize("name", TREES)
def test_combine_gives_back_every_kind_of_tree(name):
    tree, target = TREES[name]()
    params = pj.apply_lora(tree, pj.LoraConfig(r=2, target_modules=target))
    trainable, frozen = pj.partition(params)
    again = pj.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    assert [leaf.shape[-1] == 2 for leaf in jax.tree.leaves(trainable)] == [True, False]
    data = [leaf for leaf in jax.tree.leaves(params) if not callable(leaf)]  # functions are in the structure of both
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(data)
    assert jax.tree.structure(pj.unload(again)) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(pj.unload(again)), jax.tree.leaves(tree), strict=True))


def steps(tx, trainable, times=1):
    """The trainable twin after some steps with gradients of one."""
    state = tx.init(trainable)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(times):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, trainable), state, trainable)
            trainable = optax.apply_updates(trainable, updates)
    return trainable, state


def moves(tx, trainable, times=1):
    """How far each role has moved."""
    after, _ = steps(tx, trainable, times)
    labels = jax.tree.leaves(pj.trainable_labels(trainable))
    apart = [b - a for a, b in zip(jax.tree.leaves(trainable), jax.tree.leaves(after), strict=True)]
    assert all(np.ptp(array) < 1e-6 for array in apart)
    return {label: float(jnp.mean(array)) for label, array in zip(labels, apart, strict=True)}


SGD = {"lora_A": -1, "lora_B": -1, "bias": -1, "modules_to_save": -1}


@pytest.mark.parametrize(
    ("make", "times", "want"),
    [
        (lambda t: optax.masked(optax.sgd(1.0), pj.trainable_mask), 1, SGD),
        (
            lambda t: optax.masked(optax.set_to_zero(), pj.trainable_mask(t, ("lora_A", "bias"))),
            1,
            {"lora_A": 0, "lora_B": 1, "bias": 0, "modules_to_save": 1},  # what is masked passes through
        ),
        (
            lambda t: optax.partition(
                {"lora_A": optax.sgd(1.0), "lora_B": optax.sgd(16.0), "bias": optax.set_to_zero(),
                 "modules_to_save": optax.sgd(2.0)}, pj.trainable_labels),  # fmt: skip
            1,
            {"lora_A": -1, "lora_B": -16, "bias": 0, "modules_to_save": -2},
        ),
        (lambda t: optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2), 1, dict.fromkeys(SGD, 0)),
        (lambda t: optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2), 2, SGD),
    ],
    ids=["masked", "masked by role", "partition", "MultiSteps, between", "MultiSteps"],
)  # fmt: skip
def test_optax_wrappers_move_each_role_as_told(make, times, want):
    trainable, _ = pj.partition(adapted())
    assert moves(make(trainable), trainable, times) == pytest.approx(want)


def test_inject_hyperparams_changes_the_rate_without_a_new_program():
    trainable, frozen = pj.partition(adapted())
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    update = jax.jit(lambda grads, state: tx.update(grads, state))
    state, grads = tx.init(trainable), jax.tree.map(jnp.ones_like, trainable)
    for rate in (1.0, 0.25):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = update(grads, state)
        assert all(np.all(array == -rate) for array in jax.tree.leaves(updates))
    assert update._cache_size() == 1
    pj.combine(optax.apply_updates(trainable, updates), frozen)


def test_lora_plus_in_one_line():
    """B's rate is 16 times A's, as the docstring of trainable_labels has it."""
    params = pj.apply_lora(tree(), pj.LoraConfig(r=2, target_modules=["a", "c.0"]))
    trainable, _ = pj.partition(params)
    plus = optax.partition({"lora_A": optax.adamw(1e-4), "lora_B": optax.adamw(16e-4)}, pj.trainable_labels)
    after, _ = steps(plus, jax.tree.map(jnp.zeros_like, trainable))
    for label, array in zip(jax.tree.leaves(pj.trainable_labels(after)), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(array, -16e-4 if label == "lora_B" else -1e-4, rtol=1e-4)


def test_donating_all_of_one_model_leaves_another_on_the_same_base_alone():
    base = tree()
    one, other = (pj.apply_lora(base, pj.LoraConfig(r=2, target_modules=["a"], bias="all", modules_to_save=["c.0"]))
                  for _ in range(2))  # fmt: skip
    trainable, frozen = pj.partition(one)
    step = jax.jit(lambda t, f: jax.tree.map(lambda leaf: leaf * 2, t), donate_argnums=0)
    step(trainable, frozen)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    left = [leaf for leaf in jax.tree.leaves((base, other, frozen)) if isinstance(leaf, jax.Array)]
    assert left and not any(leaf.is_deleted() for leaf in left)
