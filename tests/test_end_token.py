"""The token that ends an answer, against transformers' rule for a model and the tokenizer that it is trained with."""

import dataclasses
from types import SimpleNamespace

import pytest
from cases import ARCHITECTURES

import peft_jax as pj
from peft_jax.cli.shared.end_token import end_tokens, with_end_token
from peft_jax.models import LlamaConfig

MISSING = "no such file"
ENDS = [None, 5, [5, 6], [1, 5]]
CASES = [(config, generation, end) for config in ENDS for generation in (MISSING, 5, [5, 6]) for end in (None, 1, 5)]


def listed(ends):
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


@pytest.fixture(scope="module")
def base():
    sizes = {name: ARCHITECTURES["llama"].sizes[name] for name in ("hidden_size", "vocab_size", "intermediate_size")}
    return pj.AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


@pytest.mark.parametrize(("config", "generation", "end"), CASES, ids=str)
def test_the_end_is_aligned_as_transformers_trainer_does(config, generation, end, base):
    transformers = pytest.importorskip("transformers")
    align = pytest.importorskip("transformers.trainer_utils").align_special_tokens
    theirs = SimpleNamespace(config=transformers.LlamaConfig(eos_token_id=config, bos_token_id=None))
    theirs.generation_config = transformers.GenerationConfig.from_model_config(theirs.config)
    if generation is not MISSING:
        theirs.generation_config = transformers.GenerationConfig(eos_token_id=generation)
    align(theirs, SimpleNamespace(eos_token_id=end, bos_token_id=None, pad_token_id=None))

    source = base.source
    if generation is not MISSING:
        source = dataclasses.replace(source, generation_config={"eos_token_id": generation})
    of_config = tuple(config) if isinstance(config, list) else config
    model = dataclasses.replace(base, config=dataclasses.replace(base.config, eos_token_id=of_config), source=source)
    got = with_end_token(model, SimpleNamespace(eos_token_id=end))
    assert listed(end_tokens(got)) == listed(theirs.generation_config.eos_token_id)
    assert listed(got.config.eos_token_id) == listed(theirs.config.eos_token_id)


def test_a_classifier_has_no_end(base):
    model = pj.AutoModelForSequenceClassification.from_config(dataclasses.replace(base.config, task_type="SEQ_CLS"))
    assert with_end_token(model, SimpleNamespace(eos_token_id=7)) is model
