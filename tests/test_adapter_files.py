"""Adapter files of other PEFT versions, and such that do not fit: all that is wrong is listed, nothing is loaded."""

import dataclasses
import enum
import json
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import every_method as every_row
from cases import tiny_configs
from peft_jax.interop.formats import ROWS
from safetensors.numpy import save_file

import peft_jax as pj
from peft_jax.methods import base

CASES = tiny_configs()
every_method = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def tree() -> Any:
    return {"dense": {"kernel": jax.random.normal(jax.random.key(0), (12, 8))}}


def tensors_of(config: Any) -> dict[str, np.ndarray]:
    return pj.get_peft_model_state_dict(pj.apply_adapter(tree(), config))


def refused(config: Any, tensors: dict[str, np.ndarray]) -> str:
    """What is said of a file with these tensors."""
    with pytest.raises(ValueError, match="The adapter does not fit this base") as error:
        pj.set_peft_model_state_dict(tree(), config, tensors)
    return str(error.value)


@every_method
def test_whatever_is_missing_left_over_or_of_another_shape_is_listed(config: Any) -> None:
    tensors = tensors_of(config)
    first, last = min(tensors), max(tensors)
    assert f"{last} is missing" in refused(config, {key: array for key, array in tensors.items() if key != last})
    surplus = "base_model.model.gone.lora_A.weight"
    assert f"{surplus} is left over" in refused(config, {**tensors, surplus: np.zeros((1, 1), np.float32)})
    wrong = np.zeros((*tensors[first].shape, 3), np.float32)
    assert f"{first} has shape {wrong.shape}, not {tensors[first].shape}" in refused(config, {**tensors, first: wrong})
    many = {f"base_model.model.gone.{i}.weight": np.zeros(1, np.float32) for i in range(9)}
    said = refused(config, {**tensors, **many})
    assert said.count("left over") == 4 and "and 5 more" in said


@every_method
def test_a_config_of_a_newer_version_loads_if_its_new_fields_are_off(config: Any) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    new = {"use_novelty": False, "novelty_config": None, "novelties": {}}
    assert pj.PeftConfig.from_dict({**fields, **new, "peft_version": "0.99.0"}) == config.replace(peft_version="0.99.0")
    with pytest.raises(ValueError, match=r"does not know {'use_novelty': True}. Remove these fields"):
        pj.PeftConfig.from_dict({**fields, **new, "use_novelty": True})


def test_a_config_of_an_old_version_loads() -> None:
    """As PEFT 0.3 wrote it, with fields that are gone since then and null for some defaults."""
    fields = {
        "base_model_name_or_path": "base",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": None,
        "target_modules": ["dense"],
        "task_type": "CAUSAL_LM",
    }
    config = pj.PeftConfig.from_dict(fields)
    want = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "inference_mode": True, "target_modules": ["dense"]}
    assert config == pj.LoraConfig(**want, task_type="CAUSAL_LM", base_model_name_or_path="base")
    with pytest.raises(ValueError, match=r"LoraConfig has r='4'. Give it a value of: int"):
        pj.PeftConfig.from_dict({**fields, "r": "4"})


@every_method
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_is_trained_if_that_is_said(config: Any, is_trainable: bool, tmp_path: Any) -> None:
    pj.interop.save_adapter(pj.apply_adapter(tree(), config), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    params = pj.interop.load_adapter(tree(), tmp_path, is_trainable=is_trainable)
    trained = jax.tree.leaves(pj.partition(params)[0])
    assert len(trained) == (len(jax.tree.leaves(params["dense"]["kernel"].params)) if is_trainable else 0)
    assert params["dense"]["kernel"].tag.config.inference_mode is not is_trainable


def test_a_file_without_tensors_of_its_method_is_refused(tmp_path: Any) -> None:
    pj.interop.save_adapter(pj.apply_adapter(tree(), CASES["LORA"]), tmp_path)
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"dense.lora_A.weight is missing; .* weight is left over"):
        pj.interop.load_adapter(tree(), tmp_path)


NEEDED = {name: row.needed for name, row in every_row().items()} | {"XLORA": {"adapters": {"0": "math"}}}


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_configs_are_read_whole_or_refused_by_name() -> None:
    pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    seen = set()
    for kind, theirs in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = kind.value
        try:
            fields = theirs(**NEEDED.get(name, {})).to_dict()
        except ImportError:  # of what this method needs beside PEFT
            continue
        fields = json.loads(json.dumps(fields, default=lambda value: sorted(value)))
        if name not in base.names():
            with pytest.raises(ValueError, match=f"peft_type '{name}' is not supported. Supported: ADALORA, "):
                pj.PeftConfig.from_dict(fields)
            continue
        ours = pj.PeftConfig.from_dict(fields).to_dict()
        for field in fields.keys() | ours.keys():
            one, other = (
                list(value) if isinstance(value, tuple) else value for value in (fields.get(field), ours.get(field))
            )
            assert (one or None) == (other or None), f"{name}.{field}"
        seen.add(name)
    assert seen == set(base.names()) == set(ROWS)


def test_padding_is_never_read_from_a_file() -> None:
    """A stack whose layers have other ranks: a tensor as wide as the padded array is not that layer's."""
    config = pj.LoraConfig(r=2, rank_pattern={r"layers\.1\.up": 4}, target_modules=["up"])
    stacked = {"layers": {"up": {"kernel": jnp.ones((2, 6, 5))}}}
    layout = {".*": pj.Layout((0,), (1,), (2,))}
    tensors = pj.get_peft_model_state_dict(pj.apply_adapter(stacked, config, layout=layout))
    key = "base_model.model.layers.0.up.lora_A.weight"
    with pytest.raises(ValueError, match=r"layers.0.up.lora_A.weight has shape \(4, 6\), not \(2, 6\)"):
        pj.set_peft_model_state_dict(stacked, config, {**tensors, key: np.zeros((4, 6), np.float32)}, layout=layout)


def choices_of(annotation: Any) -> list[Any]:
    """The values that a field's annotation lists: those of its enumerations and literals."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    return [value for part in typing.get_args(annotation) for value in choices_of(part)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", base.names())
def test_a_field_with_named_values_takes_those_of_peft_and_an_error_names_them(name: str) -> None:
    pytest.importorskip("peft")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    ours, theirs, needed = base.by_name(name), PEFT_TYPE_TO_CONFIG_MAPPING[name], NEEDED.get(name, {})
    checked = set()
    for field, annotation in typing.get_type_hints(theirs).items():
        values = choices_of(annotation)
        if not values or field == "peft_type" or field not in {one.name for one in dataclasses.fields(ours)}:
            continue
        if (name, field) == ("ADALORA", "init_lora_weights"):  # inherited from LoRA; any string is True there
            continue
        if (name, field) == ("SHIRA", "mask_type"):  # files name functions of users; a fresh adapter refuses them
            continue
        names = [value for value in values if isinstance(value, str)]
        for wrong in ("nonsense", *(value.swapcase() for value in names[:1])):
            with pytest.raises(ValueError, match=field) as error:
                ours(**{**needed, field: wrong})
            missing = [one for one in names if one.partition("[")[0] not in str(error.value)]
            assert not missing, f"{field}: {error.value} does not name {missing}"
        for value in names:
            try:
                ours(**{**needed, field: value.replace("[number of iters]", "4")})
            except ValueError as refusal:  # a value that goes with other fields
                assert re.search(r"not given|needs|is for causal", str(refusal)), f"{field}={value!r}: {refusal}"
        checked.add(field)
    assert "task_type" in checked


@every_method
def test_a_task_that_peft_has_not_is_refused(config: Any) -> None:
    tasks = "SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION"
    with pytest.raises(ValueError, match=f"task_type is one of {tasks}, or None, got 'seq_cls'"):
        config.replace(task_type="seq_cls")
    with pytest.raises(ValueError, match=f"task_type is one of {tasks}, or None, got 'seq_cls'"):
        pj.PeftConfig.from_dict({**config.to_dict(), "task_type": "seq_cls"})


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ("loftq", {"loftq_bits": "4"}, "loftq_bits"),
        ("loftq", {"loftq_bits": 3}, "loftq_bits=4 or 8"),
        ("eva", {"rho": "2"}, "EvaConfig has rho='2'. Give it a value of: float"),
        ("eva", {"whiten": "no"}, "EvaConfig has whiten='no'. Give it a value of: bool"),
        ("corda", {"corda_method": "IPM"}, "corda_method is 'ipm' or 'kpm', got 'IPM'"),
        ("corda", {"verbose": "no"}, "CordaConfig has verbose='no'. Give it a value of: bool"),
        ("lora_ga", {"direction": "arbr"}, "direction is one of .*'ArBr'.* got"),
        ("lora_ga", {"scale": "Unit"}, "scale one of .*'unit'.* got"),
        ("lora_ga", {"stable_gamma": "16"}, "LoraGAConfig has stable_gamma='16'. Give it a value of: int"),
        ("lora_ga", {"stable_gamma": 0}, "stable_gamma is at least 1, got 0"),
    ],
)
def test_options_of_starts_are_checked_as_fields_are(init: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pj.LoraConfig(init_lora_weights=init, **{f"{init}_config": options})
