"""Ids out of range: refused where they have values, NaN under `jax.jit`, and never a wrapped index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.core.ids import rows_at
from peft_jax.models import BertConfig, GPT2Config, LlamaConfig, T5Config
from peft_jax.train import cross_entropy

SIZES = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SIZES, intermediate_size=12)
GPT2 = GPT2Config(**SIZES, max_position_embeddings=8)
BERT = BertConfig(**SIZES, intermediate_size=12, max_position_embeddings=8, num_labels=3)
T5 = T5Config(**SIZES, intermediate_size=12, head_dim=4, pad_token_id=0, decoder_start_token_id=0)
KINDS = [list, np.asarray, jnp.asarray]


@pytest.fixture(scope="module")
def models():
    return {
        "llama": pj.AutoModelForCausalLM.from_config(LLAMA),
        "llama int8": pj.quantize(pj.AutoModelForCausalLM.from_config(LLAMA)),
        "int8 embedding": pj.quantize(pj.AutoModelForCausalLM.from_config(LLAMA), target_modules=["embed_tokens"]),
        "gpt2": pj.AutoModelForCausalLM.from_config(GPT2),
        "gpt2 tokens": pj.AutoModelForTokenClassification.from_config(GPT2),
        "bert": pj.AutoModelForSequenceClassification.from_config(BERT),
        "t5": pj.AutoModelForSeq2SeqLM.from_config(T5),
    }


def ids(*more):
    return [[1, 2, *more]]


REFUSED = {
    "a token": ("llama", {"input_ids": ids(16)}, "input_ids are from 1 to 16, but the vocabulary has ids 0 to 15"),
    "a negative token": ("llama", {"input_ids": ids(-1)}, "input_ids are from -1 to 2"),
    "padding of -100": ("bert", {"input_ids": ids(-100)}, "input_ids are from -100 to 2"),
    "a label": ("llama", {"input_ids": ids(3), "labels": ids(16)}, "labels are from 1 to 16, but the vocabulary"),
    "a negative label": ("llama", {"input_ids": ids(3), "labels": ids(-1)}, "labels are from -1 to 2"),
    "a class": ("bert", {"input_ids": ids(3), "labels": [3]}, "labels are from 3 to 3, but this model has classes 0"),
    "a type": ("bert", {"input_ids": ids(3), "token_type_ids": ids(1)}, "token_type_ids are from 1 to 2, but"),
    "a type of a GPT-2": (
        "gpt2 tokens",
        {"input_ids": ids(3), "token_type_ids": ids(16)},
        "token_type_ids are from 1 to 16",
    ),
    "a position": ("gpt2", {"input_ids": ids(3), "position_ids": ids(8)}, "position_ids are from 1 to 8, but"),
    "a negative position": ("bert", {"input_ids": ids(3), "position_ids": ids(-1)}, "position_ids are from -1 to 2"),
    "a decoder's token": (
        "t5",
        {"input_ids": ids(3), "decoder_input_ids": ids(16)},
        "decoder_input_ids are from 1 to 16, but the vocabulary",
    ),
    "a decoder's label": ("t5", {"input_ids": ids(3), "labels": ids(-2)}, "labels are from -2 to 2"),
}


@pytest.mark.parametrize("kind", KINDS, ids=["list", "numpy", "jax"])
@pytest.mark.parametrize("case", REFUSED)
def test_ids_with_values_are_refused(models, case, kind):
    name, given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        models[name](**{field: kind(array) for field, array in given.items()})


@pytest.mark.parametrize("kind", KINDS, ids=["list", "numpy", "jax"])
def test_prompts_and_tasks_with_values_are_refused(models, kind):
    for name in ("llama", "t5"):
        with pytest.raises(ValueError, match="input_ids are from 1 to 16"):
            models[name].generate(kind(ids(16)), max_new_tokens=1)
    config = pj.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2)
    model = pj.get_peft_model(models["llama"], config)
    with pytest.raises(ValueError, match="task_ids are from -1 to -1, but the prompt has the tasks 0 to 1"):
        model(kind(ids(3)), task_ids=kind([-1]))
    with pytest.raises(ValueError, match="alora_invocation_tokens are from 16 to 16, but the vocabulary"):
        pj.get_peft_model(models["llama"], pj.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[16]))


@pytest.mark.parametrize("wrong", [16, -1, -16])
@pytest.mark.parametrize("name", ["llama", "llama int8", "int8 embedding", "gpt2"])
def test_under_jit_a_token_out_of_range_is_nan_in_its_row_alone(models, name, wrong):
    model = pj.get_peft_model(models[name], pj.LoraConfig(r=2, target_modules="all-linear"))
    run = jax.jit(lambda model, ids: model(ids).logits)
    right = jnp.array([[1, 2, 3], [1, 2, 4]])
    logits = run(model, right.at[0, 1].set(wrong))
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1], run(model, right)[1], rtol=1e-6)


def test_under_jit_positions_types_tasks_and_the_decoders_tokens_are_nan_too(models):
    right = jnp.array(ids(3))
    wrong = right.at[0, 1].set(-1)
    call = jax.jit(lambda model, **given: jax.tree.leaves(model(**given))[0])
    assert np.isnan(call(models["gpt2"], input_ids=right, position_ids=wrong)[0, 1]).all()
    assert np.isnan(call(models["bert"], input_ids=right, token_type_ids=wrong)).all()
    assert np.isnan(call(models["t5"], input_ids=right, decoder_input_ids=wrong)[0, 1]).all()
    config = pj.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2)
    prompted = pj.get_peft_model(models["llama"], config)
    assert np.isnan(call(prompted, input_ids=right, task_ids=jnp.array([-1]))[0, -1]).all()


@pytest.mark.parametrize("wrong", [16, -1])
def test_under_jit_the_loss_of_a_label_out_of_range_is_nan(models, wrong):
    right = jnp.array(ids(3))
    loss = jax.jit(lambda model, labels: model(right, labels=labels).loss)
    assert np.isnan(loss(models["llama"], right.at[0, 2].set(wrong)))
    assert np.isfinite(loss(models["llama"], right.at[0, 2].set(-100)))
    for lazy in (False, True):
        logits = models["llama"](right, lazy_logits=lazy).logits
        assert np.isnan(cross_entropy(logits, right.at[0, 2].set(wrong))[0])
        assert np.isfinite(cross_entropy(logits, right.at[0, 2].set(-100))[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_the_gradient_of_an_embedding_does_not_wrap(models, quantized):
    model = models["int8 embedding" if quantized else "llama"]
    model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    trainable, frozen = pj.partition(model)

    def total(trainable, ids):
        table = pj.combine(trainable, frozen).params["model"]["embed_tokens"]
        return jnp.sum(pj.adapt(lambda tree, ids: rows_at(tree["embedding"], ids))(table, ids))

    gradient = jax.jit(jax.grad(total))(trainable, jnp.array([1, -1]))
    (rows,) = [leaf for leaf in jax.tree.leaves(gradient) if leaf.shape == (16, 2)]
    assert np.flatnonzero(np.abs(rows).sum(1)).tolist() == [1]
