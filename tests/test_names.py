"""Names made of tree paths: two leaves of one name are an error that names both, wherever one would be lost."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.core.paths import named_leaves
from peft_jax.train.loop import State
from peft_jax.train.run_state import Checkpoints

W = jnp.ones((4, 4))
NO_DOTS = r"The leaves \['x'\]\['a'\] and \['x.a'\] are both called 'x.a', and cannot be told apart by name"
CONFIG = pj.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False)


def test_two_leaves_of_one_path_are_an_error() -> None:
    tree = {"x": {"a": W}, "x.a": W}
    with pytest.raises(ValueError, match=NO_DOTS):
        named_leaves(tree)
    with pytest.raises(ValueError, match=NO_DOTS):
        pj.apply_lora(tree, CONFIG)
    with pytest.raises(ValueError, match=NO_DOTS):
        pj.apply_lora(tree, CONFIG, fn=lambda p, x: x @ p["x"]["a"] @ p["x.a"], args=(jnp.ones((1, 4)),))
    with pytest.raises(ValueError, match=NO_DOTS):
        pj.quantize(tree)
    adapted = pj.apply_lora({"x": {"a": W}}, CONFIG)
    tensors = pj.get_peft_model_state_dict(adapted)
    with pytest.raises(ValueError, match=NO_DOTS):
        pj.set_peft_model_state_dict(tree, CONFIG, tensors)
    renamed = {**adapted, "x.a": adapted["x"]["a"]}
    with pytest.raises(ValueError, match=NO_DOTS):
        pj.get_peft_model_state_dict(renamed)


def test_a_checkpoint_of_a_run_keeps_all_arrays_or_says_that_it_cannot(tmp_path: Path) -> None:
    state = State(0, {"x": {"a": W}, "x.a": W}, {}, jax.random.key(0))
    with pytest.raises(OSError, match=r"cannot be written.*both called 'trainable.x.a'"):
        Checkpoints(tmp_path, keep=1).save(state, {})
    assert not list(tmp_path.iterdir())


def test_dots_alone_are_no_harm() -> None:
    tree = {"x": {"b": {"kernel": W}}, "x.a": {"kernel": 2 * W}}
    tensors = pj.get_peft_model_state_dict(pj.apply_lora(tree, CONFIG))
    assert sorted(tensors) == ["base_model.model.x.a.lora_A.weight", "base_model.model.x.a.lora_B.weight"]


ONE_NAME: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two matrices of a module": ({"a": {"kernel": W, "weight": W}}, {"target_modules": ["a"]}, "'a' for PEFT"),
    "a matrix and an embedding": ({"a": {"embedding": W, "kernel": W}}, {"target_modules": ["a"]}, "'a' for PEFT"),
    "a leaf with no name of its own": ({"a": {"kernel": W}, "b": W}, {"target_modules": ["a", "b"]}, ""),
    "a stack and one of its layers": (
        {"layers": {"a": {"kernel": jnp.ones((2, 4, 4))}, "0": {"a": {"kernel": W}}}},
        {"target_modules": ["a"]},
        "'layers.0.a' for PEFT",
    ),
    "two weights of a saved module": (
        {"a": {"kernel": W}, "norm": {"scale": jnp.ones(4), "weight": jnp.ones(4)}},
        {"target_modules": ["a"], "modules_to_save": ["norm"]},
        "'norm.weight' for PEFT",
    ),
}


@pytest.mark.parametrize("case", ONE_NAME)
def test_two_leaves_of_one_module_are_an_error_if_both_are_adapted(case: str) -> None:
    tree, options, message = ONE_NAME[case]
    layout = {r"layers\.a\.kernel": pj.Layout((0,), (1,), (2,))} if "layers" in tree else None
    config = pj.LoraConfig(r=2, init_lora_weights=False, **options)
    if not message:
        tensors = pj.get_peft_model_state_dict(pj.apply_lora(tree, config))
        again = pj.set_peft_model_state_dict(tree, config, tensors)
        assert len(tensors) == 4 and pj.get_peft_model_state_dict(again).keys() == tensors.keys()
        return
    with pytest.raises(ValueError, match=f"The leaves '.*' and '.*' are both {message}"):
        pj.apply_lora(tree, config, layout=layout)


def test_leaves_of_one_name_that_are_not_adapted_are_no_error() -> None:
    tree = {"a": {"kernel": W}, "b": {"kernel": W, "weight": W}}
    assert len(pj.get_peft_model_state_dict(pj.apply_lora(tree, CONFIG))) == 2


def test_a_tree_whose_keys_were_changed_after_attaching_loses_nothing() -> None:
    adapted = pj.apply_lora({"a": {"kernel": W}}, CONFIG)["a"]["kernel"]
    with pytest.raises(ValueError, match="'a.kernel' and 'a.weight' both have the key 'base_model.model.a.lora_A"):
        pj.get_peft_model_state_dict({"a": {"kernel": adapted, "weight": adapted}})


def test_a_saved_leaf_that_no_convention_names_is_a_weight(tmp_path: Path) -> None:
    tree = {"a": {"kernel": W}, "head": {"w": 3 * W}}
    config = CONFIG.replace(modules_to_save=["head"])
    adapted = pj.apply_lora(tree, config)
    pj.interop.save_adapter(adapted, tmp_path)
    tensors = pj.get_peft_model_state_dict(pj.interop.load_adapter(tree, tmp_path))
    np.testing.assert_array_equal(tensors["base_model.model.head.w.weight"], 3 * np.ones((4, 4)))


@pytest.mark.parametrize("name", ["lora_A", "a", "default.1", "weight", "base_layer", "modules_to_save"])
def test_an_adapters_name_has_no_part_in_its_keys(name: str, tmp_path: Path) -> None:
    tree = {"a": {"kernel": W, "bias": jnp.ones(4)}, "head": {"kernel": W}}
    config = CONFIG.replace(bias="all", modules_to_save=["head"])
    pj.interop.save_adapter(pj.apply_lora(tree, config), tmp_path)
    pj.interop.save_adapter(pj.apply_lora(tree, config, adapter_name=name), tmp_path, adapter_name=name)
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / name)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pj.interop.load_adapter(tree, tmp_path / name, adapter_name=name)["a"]["kernel"].tag.name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "..\\a"])
def test_an_adapters_name_is_that_of_a_folder(name: str) -> None:
    tree = {"a": {"kernel": W}}
    adapted = pj.apply_lora(tree, CONFIG)
    for attach in (
        lambda: pj.apply_lora(tree, CONFIG, adapter_name=name),
        lambda: pj.set_peft_model_state_dict(tree, CONFIG, pj.get_peft_model_state_dict(adapted), adapter_name=name),
        lambda: pj.add_weighted_adapter(adapted, ["default"], [1.0], name),
    ):
        with pytest.raises(ValueError, match="cannot be named .* saved into a folder of its name"):
            attach()
