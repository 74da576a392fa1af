"""Generation with T5 against transformers' generate: the same tokens, and one run of the encoder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from t5_pairs import SIZES, as_torch, lively_pair

import peft_jax as pj
from peft_jax.models.generation import seq2seq
from peft_jax.models.generation.generation_config import Generation
from peft_jax.models.generation.sampling import Sampling

__all__ = ["lively_pair"]
IDS = np.random.default_rng(1).integers(3, SIZES["vocab_size"], (3, 7))
LEFT, RIGHT = np.ones_like(IDS), np.ones_like(IDS)
LEFT[1, :3] = LEFT[2, :1] = 0
RIGHT[1, 4:] = RIGHT[2, 6:] = 0
pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(model, inputs, **options):
    with torch.no_grad():
        return model.generate(**as_torch(inputs), do_sample=False, **options).numpy()


def padded(mask):
    return {"input_ids": np.where(mask == 1, IDS, 0), "attention_mask": mask}


@pytest.mark.parametrize("name", ["v1.0", "v1.1", "mt5"])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_greedy_tokens(name, mask, lively_pair):
    model, ours = lively_pair(name)
    inputs = padded(mask)
    want = theirs(model, inputs, max_new_tokens=14)
    assert len({tuple(row) for row in want.tolist()}) == 3 and len(set(want.ravel().tolist())) > 5
    np.testing.assert_array_equal(ours.generate(**inputs, max_new_tokens=14), want)
    unmasked = ours.generate(inputs["input_ids"], np.ones_like(mask), max_new_tokens=14)
    assert not np.array_equal(unmasked[1], want[1]), "the mask is dead"
    np.testing.assert_array_equal(ours.generate(inputs["input_ids"], max_new_tokens=14), want)  # padding told by its id


def test_rows_end_and_are_padded_until_the_last_one_ends(lively_pair):
    model, ours = lively_pair("v1.1")
    free = theirs(model, padded(LEFT), max_new_tokens=14)
    ends = [int(free[0, 3]), int(free[1, 6]), int(free[2, 9])]
    want = theirs(model, padded(LEFT), max_new_tokens=14, eos_token_id=ends)
    assert 4 < want.shape[1] < 15 and (want[:, 1:] == 0).any()
    np.testing.assert_array_equal(ours.generate(**padded(LEFT), max_new_tokens=14, eos_token_id=ends), want)


@pytest.mark.parametrize("starts", [False, True], ids=["start token put in front", "start token there"])
def test_answers_that_have_begun(starts, lively_pair):
    model, ours = lively_pair("v1.1")
    begun = np.random.default_rng(2).integers(3, SIZES["vocab_size"], (3, 4))
    mask = np.ones_like(begun)
    if starts:
        begun[:, 0] = 0
    else:
        mask[1, :2] = 0
    inputs = {**padded(RIGHT), "decoder_input_ids": begun, "decoder_attention_mask": mask}
    want = theirs(model, inputs, max_new_tokens=8)
    got = ours.generate(**inputs, max_new_tokens=8)
    np.testing.assert_array_equal(got, want)
    assert want.shape[1] == (12 if starts else 13)


def test_embeddings_or_the_encoders_output_in_place_of_ids(lively_pair):
    model, ours = lively_pair("v1.0")
    want = theirs(model, padded(LEFT), max_new_tokens=8)
    with torch.no_grad():
        embeds = model.shared(torch.tensor(padded(LEFT)["input_ids"])).numpy()
    np.testing.assert_array_equal(ours.generate(inputs_embeds=embeds, attention_mask=LEFT, max_new_tokens=8), want)
    out = ours(**padded(LEFT), decoder_input_ids=np.zeros((3, 1), int)).encoder_last_hidden_state
    np.testing.assert_array_equal(ours.generate(encoder_outputs=out, attention_mask=LEFT, max_new_tokens=8), want)


def test_repetition_penalty_counts_the_decoders_tokens(lively_pair):
    model, ours = lively_pair("v1.1")
    plain = theirs(model, padded(LEFT), max_new_tokens=14)
    want = theirs(model, padded(LEFT), max_new_tokens=14, repetition_penalty=3.0)
    assert not np.array_equal(plain, want)
    got = ours.generate(**padded(LEFT), max_new_tokens=14, repetition_penalty=3.0)
    np.testing.assert_array_equal(got, want)


def test_draws_follow_the_models_probabilities_and_the_key(lively_pair):
    _, ours = lively_pair("v1.0")
    ids = np.repeat(padded(LEFT)["input_ids"][:1], 4000, axis=0)
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 4, "temperature": 1.5}
    drawn = np.asarray(ours.generate(ids, key=jax.random.key(1), **options))[:, 1]
    logits = ours(ids[:1], decoder_input_ids=np.zeros((1, 1), int)).logits[0, 0] / 1.5
    top = jax.lax.top_k(logits, 4)
    chances = jax.nn.softmax(top[0])
    assert set(drawn.tolist()) <= set(top[1].tolist())
    for token, chance in zip(top[1], chances, strict=True):
        assert abs((drawn == int(token)).mean() - chance) < 5 * (chance * (1 - chance) / 4000) ** 0.5 + 1e-9
    again = [ours.generate(ids, key=jax.random.key(seed), **options) for seed in (1, 2)]
    np.testing.assert_array_equal(again[0][:, 1], drawn)
    assert not np.array_equal(again[0], again[1])


def test_a_stream_has_the_same_tokens(lively_pair):
    _, ours = lively_pair("v1.0")
    chunks = []

    class Streamer:
        def put(self, value):
            chunks.append(np.array(value))

        def end(self):
            chunks.append(None)

    want = ours.generate(**padded(LEFT), max_new_tokens=9)
    np.testing.assert_array_equal(ours.generate(**padded(LEFT), max_new_tokens=9, streamer=Streamer()), want)
    assert chunks.pop() is None
    np.testing.assert_array_equal(np.concatenate([chunks[0], *(chunk[:, None] for chunk in chunks[1:])], axis=1), want)


def test_the_encoder_runs_once_and_one_program_serves_all_inputs_of_a_shape(lively_pair):
    _, ours = lively_pair("v1.1")
    programs = seq2seq.programs(ours.config, Generation(5, (), 0, Sampling()), widened=False)
    for seed, mask in enumerate([LEFT, RIGHT, None]):
        ours.generate((IDS + seed) % 50, mask, max_new_tokens=5)
    assert programs.whole._cache_size() == 1
    question = seq2seq.Question(jnp.asarray(IDS), attention_mask=jnp.asarray(LEFT, bool))
    begin = jnp.zeros((3, 1), int)
    jaxpr = jax.make_jaxpr(programs.whole)((ours.params, question), begin, begin == 0, jax.random.key(0))
    (loop,) = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "while"]
    inside = [eqn for eqn in equations(loop.params["body_jaxpr"].jaxpr) if eqn.primitive.name == "scan"]
    assert len(inside) == 1 and inside[0].params["length"] == SIZES["num_decoder_layers"]
    cross = [eqn for eqn in equations(inside[0].params["jaxpr"].jaxpr) if eqn.primitive.name == "dot_general"]
    # Products with a kernel: four of self-attention, two of cross-attention (q and o), three of the feed-forward part.
    assert sum(len(eqn.invars[1].aval.shape) == 2 for eqn in cross) == 9


def equations(jaxpr):
    """All equations of a jaxpr, those inside jit included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            yield from equations(eqn.params["jaxpr"].jaxpr)
        else:
            yield eqn


def test_half_precision_generates_what_it_computes(lively_pair):
    model = lively_pair("v1.1")[1]
    model = pj.AutoModelForSeq2SeqLM.from_pretrained(model.name_or_path, dtype="float16")
    tokens = model.generate(**padded(LEFT), max_new_tokens=6)
    logits = np.asarray(model(**padded(LEFT), decoder_input_ids=tokens[:, :-1]).logits.astype(jnp.float32))
    chosen = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    assert (chosen >= logits.max(axis=-1) - 2e-3 * np.abs(logits).max()).all()


def test_int8_generates_what_its_dense_twin_does(lively_pair):
    model = pj.quantize(lively_pair("v1.1")[1])
    want = pj.merge(model).generate(**padded(LEFT), max_new_tokens=8)
    np.testing.assert_array_equal(model.generate(**padded(LEFT), max_new_tokens=8), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of input_ids, inputs_embeds and encoder_outputs, got 0"),
        ({"input_ids": IDS, "inputs_embeds": np.ones((3, 7, 24))}, "got 2 of them"),
        ({"input_ids": IDS, "decoder_attention_mask": LEFT}, "decoder_attention_mask is for decoder_input_ids"),
        ({"input_ids": IDS, "decoder_input_ids": IDS[:2]}, "decoder_input_ids have 2 rows.*inputs have 3"),
        (
            {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": RIGHT},
            "A decoder prompt ends in padding",
        ),
        ({"input_ids": IDS, "temperature": 0.5}, "temperature=0.5 asks for sampling"),
        ({"input_ids": IDS, "generation_config": {"num_beams": 4}}, "num_beams=4, which is not supported"),
        (
            {"input_ids": IDS, "generation_config": {"encoder_no_repeat_ngram_size": 3}},
            "encoder_no_repeat_ngram_size=3, which is not supported",
        ),
    ],
)
def test_wrong_arguments_are_told(options, message, lively_pair):
    with pytest.raises(ValueError, match=message):
        lively_pair("v1.0")[1].generate(**options)


def test_an_unknown_option_is_an_error_that_says_what_there_is(lively_pair):
    _, ours = lively_pair("v1.0")
    for name, message in (
        ("max_tokens", "has no argument max_tokens"),
        ("num_beams", "support transformers' num_beams"),
    ):
        with pytest.raises(TypeError, match=f"{message}. Its arguments are input_ids, .*decoder_input_ids, .*top_k"):
            ours.generate(IDS, **{name: 5})


def test_a_list_of_start_tokens_is_one_a_row(lively_pair, tmp_path):
    """As transformers takes it: in the config, in generate, with and without tokens of the answers."""
    import transformers

    model, ours = lively_pair("v1.1")
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
        (tmp_path / name).write_text(json.dumps(fields | {"decoder_start_token_id": [0, 4, 9]}))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ours = pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert ours.config.to_hf()["decoder_start_token_id"] == [0, 4, 9]
    want = theirs(model, padded(LEFT), max_new_tokens=6)
    assert want[:, 0].tolist() == [0, 4, 9]
    np.testing.assert_array_equal(ours.generate(**padded(LEFT), max_new_tokens=6), want)
    begun = {"decoder_input_ids": np.array([[7, 8], [11, 12], [13, 14]])}
    want = theirs(model, padded(LEFT) | begun, max_new_tokens=6)
    np.testing.assert_array_equal(ours.generate(**padded(LEFT), **begun, max_new_tokens=6), want)
    with pytest.raises(ValueError, match="expected to have length 2 but got 3"):
        theirs(model, {"input_ids": IDS[:2]}, max_new_tokens=6)
    with pytest.raises(ValueError, match="names 3 tokens, one a row, and the batch has 2 rows. Give one token for all"):
        ours.generate(IDS[:2], max_new_tokens=6)
    with pytest.raises(TypeError):
        model(**as_torch({"input_ids": IDS, "labels": IDS}))
    with pytest.raises(ValueError, match=r"decoder_start_token_id=\[0, 4, 9\], one a row, which labels are not"):
        ours(IDS, labels=IDS)
