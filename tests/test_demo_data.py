"""The model and the data of `peft-jax demo`: small, readable by transformers, and of use."""

import ast
import importlib.resources
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import peft_jax
from peft_jax.train import read_records

DATA = Path(str(importlib.resources.files(peft_jax))) / "cli" / "demo_data"
MODEL = DATA / "model"
FILES = {"train": DATA / "instructions_train.json", "heldout": DATA / "instructions_heldout.json"}
# Documentation of names that the pretraining program keeps for evaluation (`cpython_text.is_held_out`).
HELD_OUT_TEXT = '''def fix_missing_locations(node):
    """When you compile a node tree with compile(), the compiler expects lineno and
    col_offset attributes for every node that supports them.  This is rather
    tedious to fill in for generated nodes, so this helper adds these attributes
    recursively where not already set, by setting them to the values of the
    parent node.  It works recursively starting at *node*."""
'''


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def torch_model() -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_model_takes_less_than_4_mb() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 4_000_000


def test_the_licence_of_the_text_is_included() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (DATA / "LICENSE-PSF.txt").read_text()
    assert "pydoc_data.topics" in (DATA / "NOTICE.txt").read_text()


def test_the_tokenizer_gives_a_text_back_after_bos(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    text = "### Input:\nshuffle(x, random=None)\n\n\tünïcödé ≠ 漢字"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.is_fast
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<|bos|>", "<|eos|>", "<|pad|>"]


def test_the_config_knows_the_special_tokens(
    tokenizer: transformers.PreTrainedTokenizerFast, torch_model: transformers.PreTrainedModel
) -> None:
    config = torch_model.config
    assert config.vocab_size == len(tokenizer)
    assert config.bos_token_id == tokenizer.bos_token_id
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


def test_logits_are_those_of_transformers(
    tokenizer: transformers.PreTrainedTokenizerFast, torch_model: transformers.PreTrainedModel
) -> None:
    ids = np.array([tokenizer(HELD_OUT_TEXT)["input_ids"]])
    with torch.no_grad():
        want = torch_model(torch.from_numpy(ids)).logits.numpy()
    model = peft_jax.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    have = np.asarray(model(jnp.asarray(ids)).logits)
    assert np.abs(have - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


def test_a_text_not_seen_in_training_is_likely(
    tokenizer: transformers.PreTrainedTokenizerFast, torch_model: transformers.PreTrainedModel
) -> None:
    ids = torch.tensor([tokenizer(HELD_OUT_TEXT)["input_ids"]])
    with torch.no_grad():
        loss = torch_model(ids, labels=ids).loss.item()
    assert loss < math.log(len(tokenizer)) / 2


def function_name(signature: str) -> str:
    (statement,) = ast.parse(f"def {signature}: ...").body
    assert isinstance(statement, ast.FunctionDef)
    return statement.name


def test_no_function_is_in_both_files() -> None:
    names = {part: {function_name(record.input) for record in read_records(file)} for part, file in FILES.items()}
    assert not names["train"] & names["heldout"]


@pytest.mark.parametrize(("part", "count"), [("train", 2000), ("heldout", 200)])
def test_the_files_are_of_the_documented_size(part: str, count: int) -> None:
    assert len(json.loads(FILES[part].read_text())) == count
    assert FILES[part].stat().st_size < 300_000


@pytest.mark.parametrize("part", FILES)
def test_every_answer_can_be_read_off_its_signature(part: str) -> None:
    for record in read_records(FILES[part]):
        (statement,) = ast.parse(f"def {record.input}: ...").body
        assert isinstance(statement, ast.FunctionDef)
        parameters = [arg.arg for arg in statement.args.args]
        with_default = parameters[len(parameters) - len(statement.args.defaults) :]
        answers = {
            "Name the function.": statement.name,
            "List the parameters.": ", ".join(parameters),
            "Write a call of the function.": f"{statement.name}({', '.join(parameters)})",
            "Which parameters have a default?": ", ".join(with_default) or "none",
            "What is the last parameter?": parameters[-1],
        }
        assert record.output == answers[record.instruction]
