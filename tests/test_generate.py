"""Generation against transformers' generate: the same tokens, and draws of the same distribution."""

import dataclasses
import inspect
import json
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import peft_jax as pj
from peft_jax.models import LlamaConfig
from peft_jax.models.generation import causal
from peft_jax.models.generation.decode import is_widened
from peft_jax.models.generation.generate_options import GenerateKeywords, GenerateOptions
from peft_jax.models.generation.generation_config import Generation, resolve, with_defaults
from peft_jax.models.generation.sampling import Sampling, choose, process
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM
from peft_jax.models.registry import LLAMA

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
    programs = causal.programs(model.config, Generation(10, (), 0, Sampling(do_sample=True, top_k=50)), widened=False)
    for seed, mask in enumerate([MASK, MASK.astype(bool), None]):
        model.generate((IDS + seed) % 60, mask, max_new_tokens=10, do_sample=True, key=jax.random.key(seed))
    assert programs.whole._cache_size() == 1


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


WARPED = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"top_p": 1.0},
    {"min_p": 0.1},
    {"min_p": 0.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 2.0, "top_k": 7, "top_p": 0.8, "min_p": 0.2, "repetition_penalty": 1.1},
]


def warped(logits, tokens, options):
    """Logits as transformers' own list of processors leaves them, in the order in which generate makes it."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    config._eos_token_tensor = None
    steps = model._get_logits_processor(
        config, input_ids_seq_length=tokens.shape[1], model_kwargs={"attention_mask": torch.tensor(tokens != 0)}
    )
    return steps(torch.tensor(tokens), torch.tensor(logits)).numpy()


@pytest.mark.parametrize("options", WARPED)
def test_logits_are_processed_as_in_transformers(options):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(5, 60)).astype(np.float32)
    tokens = rng.integers(1, 60, (5, 9))
    tokens[1, :4] = 0  # padding
    want = warped(logits, tokens, options)
    got = process(jnp.asarray(logits), Sampling(True, **options), jnp.asarray(tokens), jnp.asarray(tokens != 0))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    neutral = options in ({}, {"top_k": 100}, {"top_p": 1.0}, {"min_p": 0.0})
    assert neutral == np.array_equal(got, logits), "the option is dead"


@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
def test_draws_have_the_probabilities_of_the_logits(options):
    logits = jnp.asarray(np.random.default_rng(0).normal(scale=2.0, size=(2, 12)).astype(np.float32))
    count, sampling, none = 40_000, Sampling(True, **options), jnp.zeros((2, 0), int)
    processed = process(logits, sampling, none, none)
    want = np.asarray(jax.nn.softmax(processed, axis=-1))
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.vmap(lambda key: choose(processed, sampling, key))(keys)
    got = np.stack([np.bincount(drawn[:, row], minlength=12) / count for row in range(2)])
    assert (want[got > 0] > 0).all() and (got[want > 1e-3] > 0).all(), "other tokens can be drawn"
    np.testing.assert_allclose(got, want, rtol=0, atol=4.5 * np.sqrt(0.25 / count))


def test_greedy_with_a_repetition_penalty(pair):
    model, ours = pair("llama")
    want = theirs(model, max_new_tokens=16, repetition_penalty=1.5)
    assert not np.array_equal(want, theirs(model, max_new_tokens=16))
    np.testing.assert_array_equal(ours.generate(IDS, MASK, max_new_tokens=16, repetition_penalty=1.5), want)


def drawn(model, **options):
    return np.asarray(model.generate(IDS, MASK, **{"max_new_tokens": 12, "do_sample": True, **options}))


@pytest.fixture
def with_config(pair, tmp_path):
    """A function from the contents of generation_config.json to the PyTorch model and ours with that file."""
    model, ours = pair("llama")

    def make(**fields):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ours.name_or_path, folder)
        (folder / "generation_config.json").write_text(json.dumps(fields))
        return (
            loader.from_pretrained(folder) for loader in (transformers.AutoModelForCausalLM, pj.AutoModelForCausalLM)
        )

    return make


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 5},
        {"max_length": 9},
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.5},  # of no effect in greedy decoding
        {"num_beams": 1, "length_penalty": 2.0, "typical_p": 0.5, "no_repeat_ngram_size": 0, "use_cache": False},
    ],
)
def test_generation_config_is_heeded_in_greedy_decoding(fields, with_config):
    model, ours = with_config(**fields, pad_token_id=0)
    with torch.no_grad():
        want = model.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).numpy()
    got = ours.generate(IDS, MASK)
    np.testing.assert_array_equal(got, want)
    aside = ours.generate(IDS, MASK, generation_config={})
    assert np.array_equal(got, aside) == (
        fields.keys().isdisjoint({"max_new_tokens", "max_length", "repetition_penalty"})
    )


def test_generation_config_ends_and_pads_rows(with_config):
    _, plain = with_config()
    end = int(plain.generate(IDS, MASK)[0, 8])
    model, ours = with_config(eos_token_id=[end, 59], pad_token_id=3)
    with torch.no_grad():
        want = model.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).numpy()
    assert (want[:, 6:] == 3).any()
    np.testing.assert_array_equal(ours.generate(IDS, MASK), want)


def test_a_null_end_in_generation_config_is_no_end(with_config):
    """Whatever the model's config says, as in transformers."""
    _, plain = with_config()
    end = int(plain.generate(IDS, MASK)[0, 8])
    model, ours = with_config(eos_token_id=None, max_new_tokens=9)
    ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, eos_token_id=end))
    model.config.eos_token_id = end
    with torch.no_grad():
        want = model.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).numpy()
    np.testing.assert_array_equal(ours.generate(IDS, MASK), want)
    assert not np.array_equal(ours.generate(IDS, MASK, generation_config={"max_new_tokens": 9}), want)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.4}, {"repetition_penalty": 3.0}, {}]
)
def test_generation_config_is_heeded_in_drawing_and_overridden_by_arguments(fields, with_config):
    _, ours = with_config(do_sample=True, max_new_tokens=12, **fields)
    _, plain = with_config()
    want = drawn(plain, **fields)
    np.testing.assert_array_equal(ours.generate(IDS, MASK), want)
    assert not fields or not np.array_equal(drawn(plain), want)
    other = {"temperature": 2.0, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    np.testing.assert_array_equal(ours.generate(IDS, MASK, **other), drawn(plain, **other))
    greedy = {"repetition_penalty": fields.get("repetition_penalty", 1.0)}
    np.testing.assert_array_equal(
        ours.generate(IDS, MASK, do_sample=False, max_new_tokens=6),
        plain.generate(IDS, MASK, max_new_tokens=6, **greedy),
    )


def test_drawing_is_from_50_tokens_unless_told_otherwise(pair):
    model = pair("llama")[1]
    assert transformers.GenerationConfig()._get_default_generation_params()["top_k"] == 50
    flat = {"temperature": 1e3}
    np.testing.assert_array_equal(drawn(model, **flat), drawn(model, **flat, top_k=50))
    assert not np.array_equal(drawn(model, **flat), drawn(model, **flat, top_k=0))


def test_generation_config_travels_with_the_model(with_config, tmp_path):
    fields = {"do_sample": True, "top_p": 0.5, "eos_token_id": [4, 5]}
    _, ours = with_config(**fields)
    model = pj.get_peft_model(ours, pj.LoraConfig(r=2, target_modules=["q_proj"]))
    np.testing.assert_array_equal(model.generate(IDS, MASK), ours.generate(IDS, MASK))
    model.merge_and_unload().save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 4}, "asks for num_beams=4, which is not supported"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"max_length": 6}, "max_length=6, but the prompt has 6 tokens already. Say max_new_tokens"),
        ({"do_sample": True, "temperature": 0}, "temperature is above 0"),
    ],
)
def test_a_generation_config_that_cannot_be_heeded_is_an_error(fields, message, with_config):
    _, ours = with_config(**fields)
    with pytest.raises(ValueError, match=message):
        ours.generate(IDS, MASK)
    ours.generate(IDS, MASK, generation_config={})


class Heard:
    """A streamer that keeps what it hears, and how many programs had been compiled by then."""

    def __init__(self):
        self.said, self.ended = [], False

    def put(self, value):
        self.said.append(np.array(value))

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{"max_new_tokens": 11}, {"max_new_tokens": 1}, {"do_sample": True, "top_p": 0.9}])
def test_a_stream_is_what_is_returned(options, pair):
    model = pair("llama")[1]
    heard = Heard()
    got = np.asarray(model.generate(IDS, MASK, streamer=heard, **options))
    np.testing.assert_array_equal(got, model.generate(IDS, MASK, **options))
    np.testing.assert_array_equal(np.concatenate([heard.said[0], np.stack(heard.said[1:], axis=1)], axis=1), got)
    assert heard.ended and all(token.shape == (3,) for token in heard.said[1:])


def test_a_stream_ends_when_all_rows_have(pair):
    model = pair("llama")[1]
    free = np.asarray(model.generate(IDS, MASK, max_new_tokens=16))[:, 6:]
    ends, heard = (int(free[0, 2]), int(free[1, 5]), int(free[2, 7])), Heard()
    want = model.generate(IDS, MASK, max_new_tokens=16, eos_token_id=ends)
    got = model.generate(IDS, MASK, max_new_tokens=16, eos_token_id=ends, streamer=heard)
    np.testing.assert_array_equal(got, want)
    assert len(heard.said) - 1 == want.shape[1] - 6 < 16


def test_a_stream_compiles_two_programs_whatever_its_length(pair):
    model = pair("llama")[1]
    programs = causal.programs(model.config, Generation(23, (), 0, Sampling()), widened=False)
    for _ in range(2):
        model.generate(IDS, MASK, max_new_tokens=23, streamer=Heard())
    assert (programs.whole._cache_size(), programs.start._cache_size(), programs.proceed._cache_size()) == (0, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"temperature": 0.5}, "asks for sampling. Write do_sample=True"),
        ({"top_k": 5}, "asks for sampling"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is above 0"),
        ({"do_sample": True, "top_k": -1}, "top_k is at least 1"),
        ({"min_p": 0.5}, "min_p=0.5 asks for sampling"),
        ({"do_sample": True, "min_p": 1.5}, r"min_p is in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is above 0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p is in \(0, 1\], got 1.5"),
        ({"attention_mask": MASK[:, ::-1]}, "Pad prompts on the left"),
    ],
)
def test_arguments_out_of_range(options, message, pair):
    with pytest.raises(ValueError, match=message):
        pair("llama")[1].generate(IDS, **{"attention_mask": MASK, **options})


def test_the_keywords_of_generate_are_the_fields_of_its_options():
    """A type checker reads the keywords, and a reader the documentation of the fields."""
    assert typing.get_type_hints(GenerateKeywords) == typing.get_type_hints(GenerateOptions)
    assert not GenerateKeywords.__required_keys__ and GenerateOptions().given == {}
    for name in typing.get_type_hints(GenerateOptions):
        assert f"\n    {name}: " in inspect.getdoc(GenerateOptions), f"{name} is not documented"


@pytest.mark.parametrize("handle", [CausalLM, Seq2SeqLM, pj.PeftModelForCausalLM, pj.PeftModelForSeq2SeqLM])
def test_a_type_checker_sees_the_keywords_of_every_handle(handle):
    parameters = inspect.signature(handle.generate).parameters
    assert parameters["options"].annotation == typing.Unpack[GenerateKeywords]
    assert typing.get_type_hints(GenerateOptions).keys().isdisjoint(parameters)


def test_options_that_transformers_alone_has_are_an_error_that_says_so(pair):
    model = pair("llama")[1]
    arguments = set(inspect.signature(transformers.GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    arguments |= {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    taken = {*typing.get_type_hints(GenerateOptions), *inspect.signature(model.generate).parameters}
    assert {"num_beams", "num_return_sequences", "typical_p", "max_length", "stopping_criteria"} <= arguments - taken
    for name in arguments - taken - {"transformers_version"}:
        with pytest.raises(TypeError, match=f"generate does not support transformers' {name}. Its arguments are input"):
            model.generate(IDS, **{name: 1})


@pytest.mark.parametrize("adapted", [False, True])
def test_an_unknown_option_is_an_error_that_says_what_there_is(adapted, pair):
    model = pair("llama")[1]
    if adapted:
        model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        TypeError, match=r"^generate has no argument max_tokens\. Its arguments are ([a-z_]+, )+"
    ) as error:
        model.generate(IDS, MASK, max_tokens=5)
    named = str(error.value).partition("are ")[2].rstrip(".").split(", ")
    assert named[:2] == ["input_ids", "attention_mask"] and {"key", "streamer", "generation_config"} <= set(named)
    assert named[-9:] == list(typing.get_type_hints(GenerateOptions))


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({}, {}),
        ({"do_sample": True}, {}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"temperature": 0.5, "pad_token_id": 3}),
        ({"do_sample": False, "eos_token_id": 4}, {"do_sample": True, "min_p": 0.5, "pad_token_id": 3}),
        ({"repetition_penalty": 1.5}, {"do_sample": True, "top_k": 7, "repetition_penalty": 3.0}),
    ],
)
def test_complete_options_need_no_generation_config(options, saved):
    """The command completes the options once, and gives them to the model in place of the file."""
    sizes = {"length": 4, "positions": 64, "eos_token_id": 9, "pad_token_id": 8}
    want = resolve(GenerateOptions(**options), saved, **sizes)
    complete = with_defaults(GenerateOptions(**options), saved, eos_token_id=9, pad_token_id=8)
    assert resolve(complete, {}, **sizes) == want
    assert (want == resolve(GenerateOptions(**options), {}, **sizes)) == (not saved), "the file is dead"


def test_a_program_holds_no_second_copy_of_bfloat16_weights():
    """XLA multiplies bfloat16 as float32 on the CPU; weights are converted layer by layer, not all before the loop."""
    sizes = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=16)
    params = LLAMA.init_params(config, jax.random.key(0), jnp.bfloat16)
    inputs = (params, None), IDS, jnp.ones_like(IDS), jax.random.key(0)
    held = []
    for widened in (is_widened(params), False):
        whole = causal.programs(config, Generation(5, (), 0, Sampling()), widened=widened).whole
        held.append(whole.lower(*inputs).compile().memory_analysis().temp_size_in_bytes)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{held[0]:,} and {held[1]:,} bytes beside {weights:,} of weights")
    assert held[0] < weights / 4
    assert held[1] > weights  # without: the bound can be missed
