"""NaN, infinities and subnormal numbers: found and named where they come in, and nothing is silently wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_jax.interop import load_adapter, save_adapter
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.models.llama.config import LlamaConfig
from peft_jax.models.llama.family import LLAMA
from peft_jax.models.weights_io import load_model, save_model
from peft_jax.quant import quantize_array
from peft_jax.quant.nf4 import NF4

BAD = [float("nan"), float("inf"), -float("inf")]
CONFIG = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)


@jax.jit  # where values are known, NaN is an error
def round_to_nf4(array):
    """The array of 64 on NF4's grid, as one block."""
    return NF4.of(array.reshape(-1, 1), pj.Layout()).dense().reshape(-1)


def kernel(value, place=(1, 2)):
    return jnp.ones((4, 3)).at[place].set(value)


def lora(**fields):
    return pj.LoraConfig(r=2, target_modules=["q"], **fields)


@pytest.mark.parametrize("bad", BAD)
def test_quantize_names_the_leaf_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="Leaf 'up.kernel' cannot be quantized: .* found NaN or infinity"):
        pj.quantize({"down": {"kernel": kernel(1.0)}, "up": {"kernel": kernel(bad)}})
    with pytest.raises(ValueError, match="Leaf 'q.kernel' cannot be quantized"):
        pj.quantize(pj.apply_lora({"q": {"kernel": kernel(bad)}}, lora()))


@pytest.mark.parametrize("bad", BAD)
def test_under_jit_the_whole_channel_is_nan(bad):
    dense = jax.jit(lambda array: quantize_array(array, pj.Layout()).dense())(kernel(bad))
    assert np.isnan(dense[:, 2]).all() and np.array_equal(dense[:, :2], np.ones((4, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("largest", [1e-44, 1e-39, 1.2e-38, 3e-38, 1e-37, 1e-36, 6e-8, 1e-6, 1.0, 6e4, 3.3e38])
def test_every_weight_is_within_half_a_step(dtype, largest):
    with np.errstate(all="ignore"):
        array = (np.linspace(-1, 1, 64)[:, None] * largest).astype(jnp.dtype(dtype))
    array = np.nan_to_num(array.astype(np.float64), posinf=6e4, neginf=-6e4)
    weight = quantize_array(jnp.asarray(array, dtype), pj.Layout())
    scale = np.asarray(weight.scale, np.float64)
    assert (scale > 0).all()
    assert np.all(np.abs(np.asarray(weight.q, np.float64) * scale - array) <= scale * (0.5 + 1e-5))
    assert np.isfinite(np.asarray(weight.dense(), np.float64)).all()


def test_a_block_of_subnormal_numbers_is_zeros_in_nf4():
    blocks = jnp.concatenate([jnp.full(64, 1e-39), jnp.full(64, 1.0)])
    np.testing.assert_array_equal(round_to_nf4(blocks), np.repeat([0.0, 1.0], 64))
    assert np.isnan(round_to_nf4(jnp.ones(64).at[3].set(jnp.nan))).all()


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora", "mica"])
def test_an_initialization_from_a_weight_that_is_not_finite_is_refused(init):
    config = lora(init_lora_weights=init, **({"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}))
    with pytest.raises(ValueError, match="from the weight of 'q', which holds NaN or infinity"):
        pj.apply_lora({"q": {"kernel": kernel(jnp.nan)}}, config)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_initialization_from_data_that_is_not_finite_is_refused(init):
    options = {"lora_ga_config": pj.LoraGAConfig()} if init == "lora_ga" else {}
    with pytest.raises(ValueError, match="batches give NaN or infinity at 'q"):
        pj.apply_lora_from_data(
            {"q": {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}},
            lora(init_lora_weights=init, **options),
            [jnp.ones((8, 4)).at[2, 1].set(jnp.nan)],
            fn=lambda params, x: jnp.sum(x @ params["q"]["kernel"]),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(LLAMA.init_params(CONFIG, jax.random.key(0)), CONFIG, path)
    return path


@pytest.mark.parametrize(("dtype", "bad"), list(zip(["float32", "float16", "bfloat16"], BAD, strict=True)))
@pytest.mark.parametrize("load_in_8bit", [False, True])
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "norm.weight"])
def test_reading_names_the_tensor_that_is_not_finite(folder, tmp_path, dtype, bad, load_in_8bit, name):
    tensors = load_file(folder / "model.safetensors")
    stored = {key: array.astype(jnp.dtype(dtype)) for key, array in tensors.items()}
    stored[f"model.{name}"][(3,) * stored[f"model.{name}"].ndim] = bad
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=f"'model.{name}' holds NaN or infinity in 1 of"):
        load_model(tmp_path, load_in_8bit=load_in_8bit)


def test_reading_names_the_tensor_that_float16_does_not_hold(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 7e4
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' has values beyond float16. Read it"):
        load_model(tmp_path, dtype="float16")
    load_model(tmp_path, dtype="bfloat16")


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path):
    params = LLAMA.init_params(CONFIG, jax.random.key(0))
    params["model"]["norm"]["scale"] = params["model"]["norm"]["scale"].at[0].set(jnp.inf)
    with pytest.raises(ValueError, match="not written: leaf 'model.norm.scale' holds NaN or infinity in float32"):
        save_model(params, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_beyond_the_element_type_is_refused():
    params = pj.apply_lora({"q": {"kernel": jnp.full((4, 4), 6e4, jnp.float16)}}, lora(init_lora_weights=False))
    large = jax.tree.map(lambda leaf: leaf * 3e2 if leaf.dtype == jnp.float32 else leaf, params)
    with pytest.raises(ValueError, match="Merging leaf 'q.kernel' gives NaN or infinity in float16"):
        pj.merge(large)
    assert not np.isfinite(jax.jit(pj.merge)(large)["q"]["kernel"]).all()  # nothing to look at


@pytest.mark.parametrize("bad", BAD)
def test_an_adapter_that_is_not_finite_is_neither_written_nor_read(tmp_path, bad):
    params = pj.apply_lora({"q": {"kernel": kernel(1.0)}}, lora())
    save_adapter(params, tmp_path / "good")
    broken = jax.tree.map(lambda leaf: leaf * bad if leaf.dtype == jnp.float32 else leaf, params)
    with pytest.raises(ValueError, match="'default' is not saved: its tensor 'base_model.model.q.lora_A.weight' holds"):
        save_adapter(broken, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    file = tmp_path / "good" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.q.lora_B.weight"][0, 0] = bad
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds NaN or infinity in its tensor 'base_model.model.q.lora_B.weight'"):
        load_adapter({"q": {"kernel": kernel(1.0)}}, tmp_path / "good")
