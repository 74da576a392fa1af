"""Generation against transformers' generate: the same tokens, and draws of the same distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import peft_jax as pj
from peft_jax.models import causal_lm
from peft_jax.models.generate import Sampling, _choose

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {"llama": {}, "mistral": {"sliding_window": 4}}
IDS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (3, 6))
MASK = np.ones_like(IDS)
MASK[1, :3] = 0
MASK[2, :1] = 0
IDS[MASK == 0] = SIZES["pad_token_id"]

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of what a tiny config leaves out


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function from a kind of model to the PyTorch model and ours, read from its checkpoint."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(3)
            config = transformers.AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = model, pj.AutoModelForCausalLM.from_pretrained(folder)
        return made[kind]

    return make


def theirs(model, ids=IDS, mask=MASK, **options):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model.generate(torch.tensor(ids), attention_mask=mask, do_sample=False, **options).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_with_left_padding(kind, pair):
    model, ours = pair(kind)
    want = theirs(model, max_new_tokens=16)
    assert len(set(want[:, 6:].ravel().tolist())) > 15, "a model that repeats itself proves little"
    np.testing.assert_array_equal(ours.generate(IDS, attention_mask=MASK, max_new_tokens=16), want)
    without = ours.generate(IDS, attention_mask=np.ones_like(MASK), max_new_tokens=16)
    assert not np.array_equal(without[1], want[1]), "the mask is dead"


def test_rows_end_and_are_padded_until_the_last_one_ends(pair):
    model, ours = pair("llama")
    free = theirs(model, max_new_tokens=16)[:, 6:]
    ends = (int(free[0, 2]), int(free[1, 5]), int(free[2, 7]))  # so that all rows end, at different steps
    want = theirs(model, max_new_tokens=16, eos_token_id=list(ends))
    assert 6 + 3 < want.shape[1] < 6 + 16 and (want[:, 6:] == SIZES["pad_token_id"]).any()
    np.testing.assert_array_equal(ours.generate(IDS, MASK, max_new_tokens=16, eos_token_id=ends), want)
    want = theirs(model, max_new_tokens=16, eos_token_id=ends[0], pad_token_id=59)
    np.testing.assert_array_equal(
        ours.generate(IDS, MASK, max_new_tokens=16, eos_token_id=ends[0], pad_token_id=59), want
    )


def test_without_a_mask_padding_is_told_by_its_id(pair):
    model, ours = pair("llama")
    for options in ({}, {"eos_token_id": 0}):  # where padding is the end of a text too, it cannot be told
        want = theirs(model, mask=None, max_new_tokens=16, **options)
        np.testing.assert_array_equal(ours.generate(IDS, max_new_tokens=16, **options), want)
    assert not np.array_equal(theirs(model, mask=None, max_new_tokens=16), want)


def test_an_int8_model_generates_what_its_dense_twin_does(pair):
    model = pj.quantize(pair("llama")[1])
    dense = pj.merge(model)
    got = model.generate(IDS, MASK, max_new_tokens=16)
    np.testing.assert_array_equal(got, dense.generate(IDS, MASK, max_new_tokens=16))


def test_bfloat16_with_its_cache_follows_the_uncached_model(pair):
    model = pair("llama")[1]
    model = model.replace(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    tokens = np.asarray(model.generate(IDS, MASK, max_new_tokens=16))
    mask = np.concatenate([MASK, np.ones((3, 16), int)], axis=1)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    logits = np.asarray(model(tokens, mask, position_ids=jnp.asarray(positions)).logits.astype(jnp.float32))
    chosen = np.take_along_axis(logits[:, 5:-1], tokens[:, 6:, None], axis=-1)[..., 0]
    assert (chosen >= logits[:, 5:-1].max(axis=-1) - 0.1).all()


def test_one_program_serves_all_prompts_masks_and_keys_of_a_shape(pair):
    model = pair("llama")[1]
    program = causal_lm._generation(model.config, 10, (), 0, Sampling(do_sample=True))
    for seed, mask in enumerate([MASK, MASK.astype(bool), None]):
        model.generate((IDS + seed) % 60, mask, max_new_tokens=10, do_sample=True, key=jax.random.key(seed))
    assert program._cache_size() == 1


def test_ids_out_of_range_are_an_error(pair):
    model = pair("llama")[1]
    for ids in (IDS + 60, [[-100, 3]]):
        with pytest.raises(ValueError, match="but the vocabulary has ids 0 to 59"):
            model(ids)
        with pytest.raises(ValueError, match="but the vocabulary has ids 0 to 59"):
            model.generate(ids)


def test_draws_depend_on_the_key_alone(pair):
    model = pair("llama")[1]

    def draw(seed):
        return np.asarray(model.generate(IDS, MASK, max_new_tokens=10, do_sample=True, key=jax.random.key(seed)))

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 0.05},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.8},
    ],
)
def test_draws_have_the_distribution_of_transformers(options):
    from transformers.generation import logits_process

    logits = np.random.default_rng(0).normal(scale=2.0, size=(2, 12)).astype(np.float32)
    scores = torch.tensor(logits)
    for name, warper in [("temperature", "Temperature"), ("top_k", "TopK"), ("top_p", "TopP")]:
        if name in options:
            scores = getattr(logits_process, f"{warper}LogitsWarper")(options[name])(None, scores)
    want = scores.softmax(-1).numpy()
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.vmap(lambda key: _choose(jnp.asarray(logits), key, Sampling(True, **options)))(keys)
    got = np.stack([np.bincount(drawn[:, row], minlength=12) / count for row in range(2)])
    assert (want[got > 0] > 0).all() and (got[want > 1e-3] > 0).all(), "other tokens can be drawn"
    np.testing.assert_allclose(got, want, rtol=0, atol=4.5 * np.sqrt(0.25 / count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"temperature": 0.5}, "asks for sampling. Write do_sample=True"),
        ({"top_k": 5}, "asks for sampling"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is above 0"),
        ({"do_sample": True, "top_k": 0}, "top_k is at least 1"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p is in \(0, 1\], got 1.5"),
        ({"attention_mask": MASK[:, ::-1]}, "Pad prompts on the left"),
    ],
)
def test_arguments_out_of_range(options, message, pair):
    with pytest.raises(ValueError, match=message):
        pair("llama")[1].generate(IDS, **{"attention_mask": MASK, **options})
