"""GPT-2 against PyTorch transformers: logits with padding and positions, the cache, generation, checkpoints, int8."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.models.gpt2.config import GPT2Config
from peft_jax.models.gpt2.family import GPT2
from peft_jax.models.modules.inputs import ForwardInputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=24, initializer_range=0.2, pad_token_id=60)
SIZES |= dict(bos_token_id=None, eos_token_id=None)
OPTIONS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"},
    "unscaled": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "reordered": {"reorder_and_upcast_attn": True},
}
IDS = np.random.default_rng(0).integers(0, 60, (2, 9))
RIGHT, LEFT = np.ones_like(IDS), np.ones_like(IDS)
RIGHT[1, 6:] = 0
LEFT[1, :3] = 0
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 1, 2, 3, 4, 5]])


def perturbed(model):
    """The model with biases and norms that are not those of a start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(name="plain"):
        if name not in made:
            torch.manual_seed(0)
            config = transformers.GPT2Config(**{**SIZES, **OPTIONS[name]})
            model = perturbed(transformers.GPT2LMHeadModel(config))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, pj.AutoModelForCausalLM.from_pretrained(folder), folder
        return made[name]

    return get


def close(got, want):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def tensors(**arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_hidden_states_and_loss(name, pair):
    model, ours, _ = pair(name)
    labels = np.where(RIGHT == 1, IDS, -100)
    with torch.no_grad():
        want = model(**tensors(input_ids=IDS, attention_mask=RIGHT, labels=labels), output_hidden_states=True)
    got = ours(IDS, RIGHT, labels=labels, output_hidden_states=True)
    close(got.logits, want.logits)
    close(got.hidden_states, torch.stack(want.hidden_states))
    assert float(got.loss) == pytest.approx(want.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "inputs",
    [
        {"attention_mask": LEFT},
        {"attention_mask": LEFT, "position_ids": POSITIONS},
        {"token_type_ids": IDS[:, ::-1].copy()},
    ],
    ids=["left padding", "positions", "token types"],
)
def test_inputs(inputs, pair):
    model, ours, _ = pair()
    with torch.no_grad():
        want = model(**tensors(input_ids=IDS, **inputs)).logits
    given = ForwardInputs(input_ids=jnp.asarray(IDS), **{k: jnp.asarray(v) for k, v in inputs.items()})
    got = GPT2.apply(ours.config, ours.params, given)
    close(got.logits, want)


def test_embeddings_in_place_of_ids(pair):
    model, ours, _ = pair()
    embeddings = model.transformer.wte(torch.tensor(IDS)).detach()
    with torch.no_grad():
        want = model(inputs_embeds=embeddings).logits
    close(ours(inputs_embeds=embeddings.numpy()).logits, want)


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "of each row"])
def test_a_prefix_is_transformers_past(rows, pair):
    model, ours, _ = pair()
    keys, values = np.random.default_rng(1).normal(size=(2, 3, rows, 5, 4, 8)).astype(np.float32)
    cache = transformers.DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        wide = (torch.tensor(np.broadcast_to(a, (2, 5, 4, 8)).transpose(0, 2, 1, 3).copy()) for a in (key, value))
        cache.update(*wide, layer)
    mask = np.concatenate([np.ones((2, 5), int), RIGHT], axis=1)
    with torch.no_grad():
        want = model(**tensors(input_ids=IDS, attention_mask=mask), past_key_values=cache).logits
    run = partial(GPT2.apply, ours.config, ours.params)
    inputs = ForwardInputs(input_ids=jnp.asarray(IDS), attention_mask=jnp.asarray(RIGHT))
    prefix = (jnp.asarray(keys), jnp.asarray(values))
    close(run(dataclasses.replace(inputs, prefix=prefix)).logits, want)
    assert np.abs(run(inputs).logits - want.numpy()).max() > 1e-2


def test_texts_packed_into_a_row_do_not_see_each_other(pair):
    _, ours, _ = pair()
    packed = ours(IDS[:1], segment_ids=np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])).logits
    np.testing.assert_allclose(packed[:, :4], ours(IDS[:1, :4]).logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:], ours(IDS[:1, 4:]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "unscaled"])
def test_greedy_generation_of_padded_prompts(name, pair):
    model, ours, _ = pair(name)
    inputs = tensors(input_ids=IDS, attention_mask=LEFT)
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=14, do_sample=False).numpy()
    got = np.asarray(ours.generate(IDS, LEFT, max_new_tokens=14))
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got[:, 9:])) > 4


def test_gradients_are_the_same_with_remat(pair):
    _, ours, _ = pair()

    def gradient(remat):
        def loss(params):
            inputs = ForwardInputs(input_ids=jnp.asarray(IDS), remat=remat)
            return jnp.sum(GPT2.apply(ours.config, params, inputs).logits ** 2)

        return jax.grad(loss)(ours.params)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-2), gradient(True), gradient(False))


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_come_back_whole(name, pair, tmp_path):
    model, ours, folder = pair(name)
    ours.save_pretrained(tmp_path)
    again, loading = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again.config.to_dict() | {"dtype": 0, "architectures": 0} == model.config.to_dict() | {
        "dtype": 0,
        "architectures": 0,
    } | {"_name_or_path": again.config._name_or_path}
    saved, file = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert {key: array.tobytes() for key, array in saved.items()} == {key: a.tobytes() for key, a in file.items()}


def test_an_old_checkpoint_has_no_prefix_and_has_masks(pair, tmp_path):
    _, ours, folder = pair()
    old = {key.removeprefix("transformer."): array for key, array in load_file(folder / "model.safetensors").items()}
    old |= {f"h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.float32) for i in range(3)}
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    np.testing.assert_array_equal(pj.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, ours(IDS).logits)


def test_int8_rounds_each_column_by_its_scale(pair, tmp_path):
    _, ours, folder = pair()
    model = pj.AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    kernel = model.params["transformer"]["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.q.dtype == jnp.int8 and model.params["transformer"]["wte"]["embedding"].dtype == jnp.float32
    dense = ours.params["transformer"]["h"]["attn"]["c_attn"]["kernel"]
    step = np.abs(dense).max(axis=1, keepdims=True) / 127
    assert (np.abs(kernel.dense() - dense) <= step / 2 + 1e-6).all()
    rounded = model.replace(pj.merge(model.params))  # the same weights, dense
    np.testing.assert_allclose(model(IDS).logits, rounded(IDS).logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(model.generate(IDS, LEFT), rounded.generate(IDS, LEFT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported, only False"),
        ({"activation_function": "xielu"}, "activation_function='xielu' is not supported. Supported: silu"),
        ({"n_head": 5}, "n_embd=32 is not a multiple of n_head=5"),
    ],
)
def test_what_is_not_supported_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_hf({"model_type": "gpt2", **SIZES, **changes})


def test_more_positions_than_there_are(pair):
    _, ours, _ = pair()
    with pytest.raises(ValueError, match="25 positions are needed, but this model has 24. Shorten"):
        ours(np.zeros((1, 25), int))
    with pytest.raises(ValueError, match="take 29 positions, but this model has 24. Shorten the prompts, or ask"):
        ours.generate(IDS, max_new_tokens=20)


def test_config_survives_json():
    config = GPT2Config.from_hf({"model_type": "gpt2", **SIZES, "resid_pdrop": 0.3})
    assert config.resid_pdrop == 0.3 and GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_inspect_says_whether_an_adapter_fits(pair, tmp_path, capsys):
    from peft_jax.cli.inspect.inspect import Inspect, inspect

    _, ours, folder = pair()
    pj.get_peft_model(ours, pj.LoraConfig(target_modules=["c_attn", "c_fc"])).save_pretrained(tmp_path)
    inspect(Inspect(adapter=tmp_path, model=str(folder)))
    assert "yes, by" in capsys.readouterr().out


def test_matrices_of_all_layers_are_laid_out_over_a_mesh():
    from jax.sharding import PartitionSpec

    from peft_jax.models.bert.config import BertConfig
    from peft_jax.models.bert.family import BERT
    from peft_jax.train.mesh import make_mesh, spec

    mesh, weights = make_mesh({"fsdp": 2, "tensor": 2}), ("fsdp", "expert")
    for shapes in (GPT2.param_shapes(GPT2Config()), BERT.param_shapes(BertConfig())):
        stacked = {path: shape for path, shape in shapes.items() if path.endswith("kernel") and len(shape) == 3}
        assert len(stacked) in (4, 6)
        for path, shape in stacked.items():
            assert spec(f"params.{path}", shape, mesh) in [
                PartitionSpec(None, *axes) for axes in ((weights, "tensor"), ("tensor", weights))
            ], path
