"""Every method and every architecture has exactly one row in cases.py, and what a row says of it is so."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import ARCHITECTURES, METHODS, PROMPTS, TASKS, adapters_of, llama_adapters, llama_prompts, trained_elsewhere

import peft_jax as pj
from peft_jax.methods import base
from peft_jax.models.registry import BY_MODEL_TYPE, FAMILIES


def test_every_registered_method_has_one_row() -> None:
    on_model = {name for name in base.names() if base.by_name(name).on_model}
    assert set(PROMPTS) == on_model - {"XLORA"}, "whose options are those of XLORA"
    assert set(METHODS) == set(base.names()) - on_model
    for name, row in {**METHODS, **PROMPTS}.items():
        assert getattr(pj, row.config) is base.by_name(name)


def test_every_architecture_has_one_row_and_the_row_its_model_types() -> None:
    assert len(ARCHITECTURES) == len(FAMILIES)
    for name, row in ARCHITECTURES.items():
        assert next(iter(row.model_types)) == name
        stems = {one for one, family in BY_MODEL_TYPE.items() if family is BY_MODEL_TYPE[name]}
        assert set(row.model_types) == stems


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_what_the_method_says(name: str) -> None:
    """Where both say it; the tests that take the row check what is only there."""
    row, method = METHODS[name], base.by_name(name)
    assert row.conv1d == method.takes_conv1d
    assert row.llama and row.models, "nothing of it is compared with PEFT"
    assert set(row.rounds) <= {name, *row.variants}
    assert set(row.trained_elsewhere) <= set(row.trained)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_row_says_what_the_prompt_says(name: str) -> None:
    row = PROMPTS[name]
    assert row.row in row.llama and set(row.trained) <= set(row.llama)
    assert set(row.others.values()) <= set(row.llama)


def test_no_name_of_a_comparison_is_taken_twice() -> None:
    for rows in ([row.llama for row in METHODS.values()], [row.models for row in METHODS.values()]):
        names = [name for row in rows for name in row]
        assert len(set(names)) == len(names)
    assert not set(llama_adapters()) & set(llama_prompts())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_row_of_an_architecture_names_is_there(name: str) -> None:
    row = ARCHITECTURES[name]
    adapters = adapters_of(row)
    assert {*row.adapters, *row.prompts} <= set(TASKS)
    assert {one for rows in row.adapters.values() for one in rows or ()} <= set(adapters)
    assert set(row.instead) <= set(adapters) and set(row.more) <= set(adapters)
    assert {one for rows in row.prompts.values() for one in rows} <= {prompt.row for prompt in PROMPTS.values()}
    assert set(row.generates) <= {prompt.row for prompt in PROMPTS.values()}
    assert set(row.not_trained) <= {*PROMPTS, *trained_elsewhere()}


def test_the_rows_need_neither_torch_nor_peft() -> None:
    code = "import cases, sys; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
