"""The handle of a model: its loss, its outputs, and what it is as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import peft_jax as pj

IDS = np.random.default_rng(0).integers(3, 288, (2, 9))
MASK = np.ones_like(IDS)
MASK[1, 6:] = 0
LABELS = np.where(MASK == 1, IDS, -100)
LABELS[:, :3] = -100


@pytest.fixture(scope="module")
def pair(tiny_llama):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), load(tiny_llama)


def load(folder, **options):
    return pj.AutoModelForCausalLM.from_pretrained(folder, **options)


def test_loss_logits_and_hidden_states(pair):
    model, ours = pair
    with torch.no_grad():
        want = model(
            torch.tensor(IDS),
            torch.tensor(MASK),
            labels=torch.tensor(LABELS),
            output_hidden_states=True,
            use_cache=False,
        )
    got = ours(IDS, MASK, labels=LABELS, output_hidden_states=True)
    assert float(got.loss) == pytest.approx(want.loss.item(), rel=1e-6)
    assert float(ours(IDS, MASK, labels=IDS).loss) != pytest.approx(want.loss.item(), rel=1e-3)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.hidden_states, torch.stack(want.hidden_states), rtol=0, atol=1e-5)
    assert ours(IDS, MASK).loss is None and ours(IDS, MASK).hidden_states is None


def test_loss_is_in_float32_on_a_bfloat16_model(tiny_llama, pair):
    got = load(tiny_llama, dtype="bfloat16")(IDS, MASK, labels=LABELS)
    assert got.logits.dtype == jnp.bfloat16 and got.loss.dtype == jnp.float32
    assert float(got.loss) == pytest.approx(float(pair[1](IDS, MASK, labels=LABELS).loss), rel=1e-2)


def test_embeddings_in_place_of_ids(pair):
    ours = pair[1]
    embeddings = jnp.take(ours.params["model"]["embed_tokens"]["embedding"], IDS, axis=0)
    np.testing.assert_allclose(ours(inputs_embeds=embeddings).logits, ours(IDS).logits, rtol=0, atol=1e-6)


def test_remat_reaches_the_program(tiny_llama, pair):
    recomputed, plain = (
        str(jax.make_jaxpr(lambda model: model(IDS).logits)(m)) for m in (load(tiny_llama, remat=True), pair[1])
    )
    assert "policy=None" in recomputed and "policy=None" not in plain


def test_models_of_one_shape_share_their_programs(tiny_llama, pair, tmp_path):
    ours = pair[1]
    ours.replace(jax.tree.map(lambda leaf: leaf + 1, ours.params)).save_pretrained(tmp_path)
    other = load(tmp_path)
    assert other.name_or_path == str(tmp_path) and ours.name_or_path == str(tiny_llama)
    run = jax.jit(lambda model, ids: model(ids).logits)
    assert not np.array_equal(run(ours, IDS), run(other, IDS))
    assert run._cache_size() == 1


def test_number_of_parameters(pair):
    model, ours = pair
    assert ours.num_parameters() == model.num_parameters()
    assert pj.quantize(ours).num_parameters() == model.num_parameters()
