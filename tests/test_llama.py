"""The Llama family against PyTorch transformers: whole logits tensors, in float32, at every position."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import peft_jax as pj
from peft_jax.models.llama import model as llama
from peft_jax.models.llama.config import LlamaConfig, RopeScaling
from peft_jax.models.llama.family import LLAMA
from peft_jax.models.modules.attention import BLOCKS, LEAST, attend
from peft_jax.models.modules.inputs import ARRAYS, OPTIONS, ForwardInputs
from peft_jax.models.modules.rotary import inverse_frequencies
from peft_jax.models.registry import FAMILIES
from peft_jax.models.weights_io import load_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # so that the three bands (kept, blended, divided) are all there in 4 frequencies
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear_rope": ("llama", {"rope_parameters": LINEAR}),
    "one_kv_head_wide_heads": ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu_pytorch_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("llama", {"hidden_act": "relu"}),
    "eps": ("llama", {"rms_norm_eps": 0.1}),
    "mistral_window": ("mistral", {"sliding_window": 4}),
    "mistral_no_window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_mixed_windows": ("qwen2", {"tie_word_embeddings": True, **WINDOWS}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_bias_mixed_windows": ("qwen3", {"head_dim": 8, "attention_bias": True, **WINDOWS}),
}
SMALL = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 12))
# No padding, left padding, right padding, and a hole.
MASK = np.ones_like(IDS)
MASK[1, :5] = 0
MASK[2, 8:] = 0
MASK[3, 4:6] = 0

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def torch_model(kind, options):
    """A model with random weights everywhere, norms and biases included, large enough that all of them matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function from a case's name to the PyTorch model, and our config and parameters read from its checkpoint."""
    made = {}

    def make(name):
        if name not in made:
            model = torch_model(*CASES[name])
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = (model, *load_model(folder))
        return made[name]

    return make


def theirs(model, **inputs):
    with torch.no_grad():
        return model(**{k: torch.tensor(np.asarray(v)) for k, v in inputs.items()}, output_hidden_states=True)


forward = jax.jit(LLAMA.apply, static_argnums=0)


def ours(config, params, **inputs):
    static = {name: inputs.pop(name) for name in ("output_hidden_states",) if name in inputs}
    return forward(config, params, ForwardInputs(**jax.tree.map(jnp.asarray, inputs), **static))


def close(got, want, factor=1.0):
    want = want.numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=factor * 1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_at_all_positions(name, pair):
    model, config, params = pair(name)
    want = theirs(model, input_ids=IDS, attention_mask=MASK)
    got = ours(config, params, input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    close(got.logits, want.logits)
    assert len(got.hidden_states) == len(want.hidden_states) == config.num_hidden_layers + 1
    for layer, (one, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        close(one, other, factor=2)
        assert layer == 0 or np.abs(one - got.hidden_states[layer - 1]).max() > 0.1


@pytest.mark.parametrize("name", ["biases", "qwen2_tied_mixed_windows", "qwen3_bias_mixed_windows"])
def test_every_leaf_matters(name, pair):
    """Leaves that do not move the logits could hold anything, and parity would not notice."""
    _, config, params = pair(name)
    logits = ours(config, params, input_ids=IDS, attention_mask=MASK).logits
    leaves, treedef = jax.tree.flatten(params)
    for index, leaf in enumerate(leaves):
        noise = 0.1 * jax.random.normal(jax.random.key(index), leaf.shape)
        changed = jax.tree.unflatten(treedef, [*leaves[:index], leaf + noise, *leaves[index + 1 :]])
        path = list(LLAMA.param_shapes(config))[index]
        assert np.abs(ours(config, changed, input_ids=IDS, attention_mask=MASK).logits - logits).max() > 1e-3, path


@pytest.mark.parametrize(
    ("name", "plain"), [("llama3", "rope_parameters"), ("linear_rope", "rope_parameters"), ("mistral_window", None)]
)
def test_scaled_rotations_and_windows_bite(name, plain, pair):
    _, config, params = pair(name)
    without = (
        dataclasses.replace(config, rope_scaling=RopeScaling())
        if plain
        else dataclasses.replace(config, sliding_window=None, layer_types=None)
    )
    difference = ours(config, params, input_ids=IDS).logits - ours(without, params, input_ids=IDS).logits
    assert np.abs(difference).max() > 0.1


def test_llama3_frequencies_are_kept_blended_and_divided(pair):
    _, config, _ = pair("llama3")
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=RopeScaling()).rope, 8, 64)
    ratio = plain / inverse_frequencies(config.rope, 8, 64)
    assert ratio[0] == 1 and 1 < ratio[1] < 8 and ratio[-1] == pytest.approx(8)


@pytest.mark.parametrize("name", ["llama2", "mistral_window"])
def test_position_ids_and_embeddings(name, pair):
    model, config, params = pair(name)
    positions = np.maximum(MASK.cumsum(-1) - 1, 0)
    want = theirs(model, input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
    close(ours(config, params, input_ids=IDS, attention_mask=MASK, position_ids=positions).logits, want)
    assert np.abs(want - theirs(model, input_ids=IDS, attention_mask=MASK).logits).max() > 0.1
    jumps = np.random.default_rng(3).integers(0, 60, (1, 12))
    close(
        ours(config, params, input_ids=IDS, position_ids=jumps).logits,
        theirs(model, input_ids=IDS, position_ids=jumps).logits,
    )
    embeddings = np.random.default_rng(1).normal(size=(*IDS.shape, 32)).astype(np.float32)
    want = theirs(model, inputs_embeds=embeddings, attention_mask=MASK).logits
    close(ours(config, params, inputs_embeds=embeddings, attention_mask=MASK).logits, want)


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_tied_mixed_windows"])
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_call(name, pair):
    _, config, params = pair(name)
    want = ours(config, params, input_ids=IDS, attention_mask=MASK).logits
    cache = LLAMA.init_cache(config, len(IDS), 15)  # longer than need be
    got = []
    for start, stop, seen in [(0, 6, 6), (6, 7, 12), (7, 8, 12), (8, 9, 12), (9, 12, 12)]:
        out = ours(config, params, input_ids=IDS[:, start:stop], attention_mask=MASK[:, :seen], cache=cache)
        cache = out.cache
        got.append(out.logits)
    assert int(cache.index) == 12
    close(jnp.concatenate(got, axis=1), want)


@pytest.mark.parametrize("name", ["qwen2_tied_mixed_windows"])
def test_remat_changes_neither_values_nor_gradients(name, pair):
    _, config, params = pair(name)

    def loss(params, remat):
        inputs = ForwardInputs(input_ids=jnp.asarray(IDS), attention_mask=jnp.asarray(MASK), remat=remat)
        out = LLAMA.apply(config, params, inputs)
        return jnp.mean(jnp.square(out.logits))

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, False)
    again, regradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, True)
    assert value == pytest.approx(float(again), rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(regradient), strict=True):
        assert np.isfinite(one).all() and np.abs(one).max() > 0
        close(one, other)
    assert "policy=None" in str(jax.make_jaxpr(loss, static_argnums=1)(params, True))
    assert "policy=None" not in str(jax.make_jaxpr(loss, static_argnums=1)(params, False))


@pytest.mark.parametrize("name", ["biases"])
def test_gradients_are_those_of_torch(name, pair, tmp_path):
    model, config, params = pair(name)
    weights = np.random.default_rng(2).normal(size=(*IDS.shape, SIZES["vocab_size"])).astype(np.float32)
    model.zero_grad()
    out = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
    (out * torch.tensor(weights)).mean().backward()

    def loss(params):
        inputs = ForwardInputs(input_ids=jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
        return jnp.mean(LLAMA.apply(config, params, inputs).logits * weights)

    gradient = jax.jit(jax.grad(loss))(params)["model"]
    want = dict(model.named_parameters())
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        first, second = module.split(".")
        for layer in range(config.num_hidden_layers):
            got = gradient["layers"][first][second]["kernel"][layer].T
            close(got / np.abs(got).max(), want[f"model.layers.{layer}.{module}.weight"].grad / np.abs(got).max())
    got = gradient["embed_tokens"]["embedding"]
    close(got / np.abs(got).max(), want["model.embed_tokens.weight"].grad / np.abs(got).max())


@pytest.mark.parametrize("length, virtual", [(LEAST * BLOCKS + 3, 0), (2 * LEAST, 5)])
def test_causal_attention_in_blocks_is_attention(length, virtual):
    """Values and gradients, with padding, so that the first queries see nothing but the virtual positions."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, 4, 8), *[(2, length + virtual, 2, 8)] * 2, (2, length, 4, 8)]
    q, k, v, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    place = jnp.arange(length + virtual)[None, None]
    mask = place <= jnp.arange(length)[None, :, None] + virtual
    mask &= (place < virtual) | (place >= virtual + jnp.array([0, 7])[:, None, None])

    def weighted(q, k, v, causal):
        out = attend(q, k, v, mask, causal=causal)
        return jnp.sum(out * cotangent), out

    of = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True), static_argnames="causal")
    want = of(q, k, v, causal=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max())),
        of(q, k, v, causal=True),
        want,
    )
    assert np.all(np.asarray(want[0][1])[1, :7] == 0) == (virtual == 0)


def test_bfloat16_is_as_near_to_float32_as_in_torch(pair, tmp_path):
    model, config, params = pair("llama2")
    exact = theirs(model, input_ids=IDS, attention_mask=MASK).logits
    model = torch_model(*CASES["llama2"]).bfloat16()
    model.save_pretrained(tmp_path)
    config, params = load_model(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    got = ours(config, params, input_ids=IDS, attention_mask=MASK).logits
    assert got.dtype == jnp.bfloat16
    their_error = (theirs(model, input_ids=IDS, attention_mask=MASK).logits.float() - exact).abs()
    our_error = np.abs(got.astype(np.float32) - exact.numpy())
    assert our_error.max() < 1.5 * their_error.max() and our_error.mean() < 1.2 * their_error.mean()


def test_compile_time_does_not_grow_with_depth():
    def size(layers):
        config = dataclasses.replace(SMALL, num_hidden_layers=layers, layer_types=None)
        return len(
            str(jax.make_jaxpr(partial(LLAMA.apply, config))(shapes(config), ForwardInputs(input_ids=IDS))).splitlines()
        )

    assert size(2) == size(20)


def test_the_module_and_the_function_agree():
    model = llama.Llama(SMALL, rngs=nnx.Rngs(3))
    params = nnx.to_pure_dict(nnx.state(model))
    got = nnx.jit(lambda model: model(ForwardInputs(input_ids=jnp.asarray(IDS))).logits)(model)
    np.testing.assert_array_equal(got, ours(SMALL, params, input_ids=IDS).logits)
    spread = float(jnp.std(params["model"]["layers"]["mlp"]["up_proj"]["kernel"]))
    assert spread == pytest.approx(SMALL.initializer_range, rel=0.1)
    one, other = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(one, other), "all layers start alike"


def test_a_wider_scale_does_not_widen_the_stream():
    params = jax.eval_shape(lambda: LLAMA.init_params(SMALL, jax.random.key(0), jnp.bfloat16))
    params["model"]["layers"]["input_layernorm"]["scale"] = jax.ShapeDtypeStruct((2, 32), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        assert (
            jax.eval_shape(partial(LLAMA.apply, SMALL), params, ForwardInputs(input_ids=IDS)).logits.dtype
            == jnp.bfloat16
        )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "one of them, got neither"),
        ({"input_ids": IDS, "inputs_embeds": np.zeros((4, 12, 32), np.float32)}, "one of them, got both"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :11]}, r"4 rows and 12, like the inputs columns, got .*11"),
        ({"input_ids": IDS, "attention_mask": np.ones((4, 13), int)}, "got shape"),
        ({"input_ids": IDS, "attention_mask": MASK[:3]}, "4 rows"),
        ({"input_ids": IDS, "position_ids": np.arange(11)[None]}, r"position_ids must be \(4, 12\)"),
    ],
)
def test_wrong_inputs_are_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(LLAMA.apply, SMALL), shapes(SMALL), ForwardInputs(**inputs))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.backbone or family.embedding)
def test_an_input_that_an_architecture_does_not_take_is_an_error(family):
    takes = family.module.takes
    assert takes <= {*ARRAYS, *OPTIONS}
    config = family.config()
    for name in {*ARRAYS, *OPTIONS} - takes:
        given = {name: not OPTIONS[name] if name in OPTIONS else IDS}
        with pytest.raises(ValueError, match=f"{name} is given, which {config.architecture} does not take"):
            family.apply(config, {}, ForwardInputs(**given))


def test_a_call_names_the_input_that_its_architecture_does_not_take():
    model = pj.AutoModelForSequenceClassification.from_config(dataclasses.replace(SMALL, pad_token_id=0))
    with pytest.raises(ValueError, match="token_type_ids is given, which LlamaForSequenceClassification does not take"):
        model(IDS, token_type_ids=np.zeros_like(IDS))


def shapes(config):
    return jax.eval_shape(lambda: LLAMA.init_params(config, jax.random.key(0)))


def test_a_cache_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="room for 11 positions, got 12"):
        inputs = ForwardInputs(input_ids=IDS, cache=LLAMA.init_cache(SMALL, 4, 11))
        jax.eval_shape(partial(LLAMA.apply, SMALL), shapes(SMALL), inputs)


def test_parameters_of_another_config_are_an_error():
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"missing \[\], surplus \['lm_head.kernel'\]"):
        jax.eval_shape(partial(LLAMA.apply, tied), shapes(SMALL), ForwardInputs(input_ids=IDS))
    with pytest.raises(ValueError, match=r"lm_head.kernel is \(32, 50\), not \(32, 51\)"):
        wider = dataclasses.replace(SMALL, vocab_size=51)
        jax.eval_shape(partial(LLAMA.apply, wider), shapes(SMALL), ForwardInputs(input_ids=IDS))


@pytest.mark.parametrize("name", CASES)
def test_config_survives_a_file(name):
    kind, options = CASES[name]
    config = LlamaConfig.from_hf(transformers.AutoConfig.for_model(kind, **{**SIZES, **options}))
    assert hash(config) == hash(LlamaConfig.from_hf(config.to_hf()))
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_config_of_older_transformers():
    old = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "rope_theta": 500.0}
    scaling = {"type": "linear", "factor": 2.0}
    config = LlamaConfig.from_hf({**old, "rope_scaling": scaling, "torch_dtype": "float16"})
    assert config.rope_theta == 500.0
    assert config.rope_scaling == RopeScaling("linear", 2.0)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert LlamaConfig.from_hf({**old, "eos_token_id": [1, 2]}).eos_token_id == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported. Supported: llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_type='axial' is not supported"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2]}}, r"\['mrope_section'\] are not"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not supported. Supported: silu"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method='aqlm'.*load_in_8bit=True"),
        ({"is_causal": False}, "is_causal=False"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"head_dim": 3}, "even head_dim, got head_dim=3"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_config_asks_for_in_vain_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf({"model_type": "llama", **SIZES, **changes})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ("full_attention",)}, "for each of 2 layers"),
        ({"layer_types": ("full_attention", "chunked_attention")}, "must name 'full_attention' or"),
        ({"layer_types": ("full_attention", "sliding_attention")}, "Set sliding_window"),
        ({"model_type": "gemma"}, "model_type='gemma'"),
    ],
)
def test_fields_that_contradict_each_other_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize("form", ["ours", "theirs", "dict"])
def test_a_model_of_any_form_of_config(form):
    theirs = transformers.LlamaConfig(**SIZES)
    config = {"ours": LlamaConfig.from_hf(theirs), "theirs": theirs, "dict": theirs.to_dict()}[form]
    model = pj.AutoModelForSequenceClassification.from_config(config)
    assert model.config == dataclasses.replace(LlamaConfig.from_hf(theirs), task_type="SEQ_CLS")
    with torch.device("meta"):
        theirs_model = transformers.LlamaForSequenceClassification(theirs)
    assert model.num_parameters() == sum(parameter.numel() for parameter in theirs_model.parameters())


@pytest.mark.parametrize("given", ["gpt2", 3, None])
def test_what_is_no_config_is_refused(given):
    with pytest.raises(ValueError, match=f"{given!r} is no config. Give one of .*from_pretrained"):
        pj.AutoModelForCausalLM.from_config(given)


def test_a_config_without_a_hugging_face_class_is_not_written():
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot express"):
        dataclasses.replace(SMALL, qk_norm=True).to_hf()


@pytest.mark.parametrize("keep", [1, 3])
def test_logits_of_the_last_positions_alone(keep, pair):
    _, config, params = pair("biases")
    whole = ours(config, params, input_ids=IDS, attention_mask=MASK).logits
    inputs = ForwardInputs(input_ids=jnp.asarray(IDS), attention_mask=jnp.asarray(MASK), logits_to_keep=keep)
    last = jax.jit(partial(LLAMA.apply, config))(params, inputs).logits
    assert last.shape[1] == keep
    close(last, whole[:, -keep:])
