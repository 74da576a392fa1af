"""Twins, masks and labels, with optax over the trainable twin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
