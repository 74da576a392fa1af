"""Quantized checkpoints of other libraries: their values, whole models, and what damaged ones are told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft_jax.interop.files import open_metadata, open_tensors
from peft_jax.interop.quantized import QuantizedTensor, check_quant_method, read_quantized
from peft_jax.interop.quantized.gptq import GPTQTensor
from peft_jax.interop.quantized.open_quantized import FORMATS as READ
from quantized_writers import FORMATS, Format, compressed_settings, random_weight, save, split
from safetensors.torch import load_file, save_file

import peft_jax as pj
from peft_jax.models.weights_io import load_model
from peft_jax.quant import Int8

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 7))
GPTQ, AWQ = "gptq int4 by 16 v1 act-order", "awq by 16"
NF4, INT8, FP8 = "bitsandbytes nf4 nested float16", "bitsandbytes int8", "fp8 blocks"
INT4 = "pack-quantized int4 group asymmetric float16"
WHOLE = [
    *("bitsandbytes nf4 bfloat16", NF4, "bitsandbytes fp4 float32", INT8, GPTQ, "gptq int8 by 32 v2 symmetric", AWQ),
    *(INT4, "int-quantized int8 channel bfloat16", "float-quantized float8 channel bfloat16", FP8, "fp8 tensor"),
    *("fbgemm_fp8", "torchao int8", "torchao int4"),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def torch_llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **options)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def read(folder, **options):
    """Our model; the warning is part of it."""
    with pytest.warns(UserWarning, match="dequantized to"):
        return pj.AutoModelForCausalLM.from_pretrained(folder, **options)


def put_in_file(folder, name, weight=None):
    """One weight in a file of its own; returns its config, its tensors and what they stand for."""
    form = FORMATS[name]
    written, want = form.write("model.up", random_weight(32, 128) if weight is None else weight)
    parts, texts = split(written)
    save_file(parts, folder / "model.safetensors", metadata=texts or None)
    return form.settings, open_tensors(folder, packed=True), want


# -- values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_formats_own_reader(name, tmp_path, monkeypatch):
    settings, tensors, want = put_in_file(tmp_path, name)
    found, words = read_quantized(settings, tensors, open_metadata(tmp_path))
    ((key, weight),) = found.items()
    assert isinstance(weight, QuantizedTensor) and key == weight.key
    assert key == ("model.up" if name == "mxfp4" else "model.up.weight")
    got = np.asarray(weight)
    assert got.dtype == weight.dtype and str(want.dtype) == f"torch.{got.dtype}"
    assert got.shape == weight.shape == tuple(want.shape) and got.nbytes == weight.nbytes
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())
    monkeypatch.setattr("peft_jax.interop.quantized.base.CHUNK", 3 * 128)
    np.testing.assert_array_equal(np.asarray(weight), got, err_msg="some rows at a time")
    assert weight.packed_nbytes < got.astype(np.float32).nbytes / 1.5 and words.startswith("1 weights quantized by ")


def test_every_format_is_written_here():
    methods = {form.settings.get("quant_method", "bitsandbytes") for form in FORMATS.values()}
    assert methods == READ.keys()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(6, 50), (5, 7)])
def test_a_block_may_go_over_rows_and_the_last_may_be_short(kind, shape):
    """bitsandbytes' CPU kernel reads other scales there, which its own quantization error shows; CUDA's does not."""
    weight = random_weight(*shape)
    parts, _ = FORMATS["bitsandbytes fp4 float32"].write.func(
        "up", weight, dtype=torch.float32, quant_type=kind, blocksize=64
    )
    tensors = {key: tensor.numpy() for key, tensor in parts.items()}
    got = np.asarray(read_quantized({"load_in_4bit": True}, tensors)[0]["up.weight"])
    largest = np.repeat(parts["up.weight.absmax"].numpy(), 64)[: weight.numel()].reshape(shape)
    widest = {"nf4": 0.16, "fp4": 0.17}[kind]  # half of the table's widest gap
    assert (np.abs(got - weight.numpy()) <= widest * largest).all()


def test_fields_that_the_first_version_of_gptq_borrowed_across_are_given_back(tmp_path):
    """GPTQModel subtracts 1 from each field of a word at once, and a zero point of 0 borrows from the next field."""
    v2, v1 = "gptq int4 by 32 v2 act-order", {"quant_method": "gptq", "bits": 4, "group_size": 32}
    settings, tensors, _ = put_in_file(tmp_path, v2)
    zeros = np.array(tensors["model.up.qzeros"])
    zeros[:, 0] = 0x00F000F0
    wanted = read_quantized(settings, {**tensors, "model.up.qzeros": zeros})[0]["model.up.weight"]
    less = (zeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    found = read_quantized(v1, {**tensors, "model.up.qzeros": less})[0]["model.up.weight"]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_inputs_of_compressed_tensors_may_be_in_any_order(tmp_path):
    """Older versions write ``weight_g_idx``: the group of each input, or -1 where they are in order."""
    settings, tensors, want = put_in_file(tmp_path, INT4)
    in_order = {**tensors, "model.up.weight_g_idx": np.full(128, -1, np.int32)}
    np.testing.assert_array_equal(np.asarray(read_quantized(settings, in_order)[0]["model.up.weight"]), want.numpy())
    g_idx = np.random.default_rng(0).permutation(np.arange(128, dtype=np.int32) // 16)
    words = {key: torch.tensor(tensors[f"model.up.weight_{key}"]) for key in ("packed", "zero_point", "scale")}
    integers = unpack_from_int32(words["packed"], 4, (32, 128))
    zeros = unpack_from_int32(words["zero_point"], 4, (32, 8), packed_dim=0)
    got = read_quantized(settings, {**tensors, "model.up.weight_g_idx": g_idx})[0]["model.up.weight"]
    wanted = (integers - zeros[:, g_idx]) * words["scale"][:, g_idx]
    np.testing.assert_array_equal(np.asarray(got), wanted.numpy())
    with pytest.raises(ValueError, match="'model.up.weight_g_idx' names groups 0 to 8, and there are 8"):
        read_quantized(settings, {**tensors, "model.up.weight_g_idx": np.append(g_idx[1:], np.int32(8))})


def test_fp8_by_tensor_as_vllm_has_it():
    """``weight_scale``, and static scales of activations, which the words say are not applied."""
    values = np.arange(-4, 4).reshape(2, 4).astype(jnp.float8_e4m3fn)
    scales = {
        f"up.{name}": np.array(number, np.float32) for name, number in [("weight_scale", 0.5), ("input_scale", 3)]
    }
    found, words = read_quantized({"quant_method": "fp8"}, {"up.weight": values, **scales})
    assert list(found) == ["up.weight"] and words.endswith("whose quantization of activations is not applied")
    np.testing.assert_array_equal(np.asarray(found["up.weight"]), np.arange(-4, 4).reshape(2, 4) * 0.5)


# -- whole models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_the_dequantized_one(name, tmp_path):
    model = torch_llama()
    want = save(tmp_path, model, FORMATS[name])
    plain = torch_logits(model)
    model.load_state_dict({key: tensor.float() for key, tensor in want.items()})
    ours = read(tmp_path, dtype="float32")
    wanted = torch_logits(model)
    np.testing.assert_allclose(ours(IDS).logits, wanted, atol=1e-5)
    assert np.abs(wanted - plain).max() > 1e-3, "quantization shows"


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_checkpoints_that_transformers_saves_with_bitsandbytes(kind, tmp_path):
    torch_llama().save_pretrained(tmp_path / "plain")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if kind == "4bit" else {}
    config = transformers.BitsAndBytesConfig(**{f"load_in_{kind}": True}, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dequantize()
    np.testing.assert_allclose(read(tmp_path / "quantized")(IDS).logits, torch_logits(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (INT4, transformers.CompressedTensorsConfig),
        ("float-quantized float8 channel bfloat16", transformers.CompressedTensorsConfig),
        (FP8, transformers.FineGrainedFP8Config),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_checkpoints_that_transformers_dequantizes(name, config, tmp_path):
    save(tmp_path, torch_llama(), FORMATS[name])
    options = {"dtype": torch.float32, "quantization_config": config(dequantize=True)}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    np.testing.assert_allclose(read(tmp_path)(IDS).logits, torch_logits(theirs), atol=1e-5)


def test_a_checkpoint_that_transformers_saves_with_torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="the extra test-torchao is not installed")
    torch_llama().save_pretrained(tmp_path / "plain")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    options = {"dtype": torch.float32, "quantization_config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)
    model.save_pretrained(tmp_path / "quantized")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    linear = [module for name, module in theirs.named_modules() if name.endswith("_proj")]
    for module in linear:
        module.weight = torch.nn.Parameter(module.weight.dequantize())
    np.testing.assert_allclose(read(tmp_path / "quantized")(IDS).logits, torch_logits(theirs), atol=1e-5)


def test_matrices_that_plain_checkpoints_store_the_other_way_round(tmp_path):
    """GPT-2's: bitsandbytes stores all matrices as (out, in)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantization}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options)
    model.save_pretrained(tmp_path / "quantized")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dequantize()
    np.testing.assert_allclose(read(tmp_path / "quantized")(IDS).logits, torch_logits(theirs), atol=1e-5)


def test_an_adapter_does_on_it_as_peft_does_on_the_dequantized_model(tmp_path):
    model = torch_llama()
    want = save(tmp_path, model, FORMATS[NF4])
    model.load_state_dict({key: tensor.float() for key, tensor in want.items()})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    base = read(tmp_path, dtype="float32")
    ours = pj.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(ours(IDS).logits, torch_logits(adapted), atol=1e-5)
    assert np.abs(ours(IDS).logits - base(IDS).logits).max() > 1e-2
    fresh = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    np.testing.assert_allclose(fresh(IDS).logits, base(IDS).logits, atol=1e-6)


def test_dequantized_layers_are_rounded_to_int8_where_that_is_asked_for(tmp_path):
    want = save(tmp_path, torch_llama(), FORMATS[GPTQ])
    message = r"14 weights quantized by gptq in [\d,]+ bytes. They are dequantized to bfloat16"
    with pytest.warns(UserWarning, match=message) as said:
        _, params = load_model(tmp_path, load_in_8bit=True, dtype="bfloat16")
    elements = sum(weight.numel() for key, weight in want.items() if "_proj" in key)
    assert f"in {2 * elements:,} bytes; those of the layers are then rounded to int8." in str(said[0].message)
    leaf = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(leaf, Int8)
    weight = want["model.layers.1.mlp.up_proj.weight"].float().numpy()
    steps = np.abs(weight).max(1) / 127
    np.testing.assert_allclose(leaf.scale[1], steps, rtol=1e-6)
    error = np.abs(np.asarray(leaf.q[1]).T * steps[:, None] - weight)
    assert (error <= steps[:, None] * 0.5001).all(), "rounded once"
    with pytest.warns(UserWarning, match="those of the layers are then rounded to nf4"):
        load_model(tmp_path, load_in_4bit=True)


def test_a_weight_is_dequantized_when_its_turn_has_come_and_not_kept(tmp_path, monkeypatch):
    save(tmp_path, torch_llama(), FORMATS[GPTQ])
    seen = []
    dequantize = GPTQTensor.dequantize
    monkeypatch.setattr(GPTQTensor, "dequantize", lambda self: seen.append(self.key) or dequantize(self))
    with pytest.warns(UserWarning):
        load_model(tmp_path)
    assert len(seen) == len(set(seen)) == 14


def test_modules_that_are_not_converted_stay_as_they_are(tmp_path):
    settings = {**FORMATS[GPTQ].settings, "modules_in_block_to_quantize": [["mlp.up_proj"]]}
    model = torch_llama()
    want = save(tmp_path, model, Format(settings, FORMATS[GPTQ].write), every="up_proj")
    _, params = load_all(tmp_path, dtype="float32")
    layers = params["model"]["layers"]
    kept = want["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_array_equal(layers["mlp"]["down_proj"]["kernel"][0].T, kept)
    np.testing.assert_array_equal(
        layers["mlp"]["up_proj"]["kernel"][0].T, want["model.layers.0.mlp.up_proj.weight"].float().numpy()
    )


def load_all(folder, **options):
    with pytest.warns(UserWarning, match="dequantized to"):
        return load_model(folder, **options)


def test_modules_may_have_bits_of_their_own(tmp_path):
    """GPTQModel's ``dynamic``."""
    settings, four, _ = put_in_file(tmp_path, GPTQ)
    _, eight, want = put_in_file(tmp_path, "gptq int8 by 16 v1 act-order")
    other = {key.replace("up", "down"): tensor for key, tensor in eight.items()}
    settings = {**settings, "dynamic": {r"-:.*gate": {}, r"+:.*\.down": {"bits": 8}}}
    found, _ = read_quantized(settings, {**four, **other})
    np.testing.assert_array_equal(np.asarray(found["model.down.weight"]), want.numpy())
    assert found["model.up.weight"].bits == 4


def test_biases_of_zeros_that_the_model_has_not_are_left_out(tmp_path):
    """AutoGPTQ gave each of its layers one."""
    save(tmp_path, torch_llama(), FORMATS[GPTQ])
    tensors = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file({**tensors, bias: torch.zeros(64)}, tmp_path / "model.safetensors")
    load_all(tmp_path)
    save_file({**tensors, bias: torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"left over: {bias}"):
        load_all(tmp_path)


# -- what is refused -----------------------------------------------------------------------------------


def lose(ending):
    return lambda settings, tensors: tensors.pop(next(key for key in tensors if key.endswith(ending)))


def change(ending, edit):
    def damage(settings, tensors):
        key = next(key for key in tensors if key.endswith(ending))
        tensors[key] = edit(np.array(tensors[key]))

    return damage


def say(**fields):
    return lambda settings, tensors: settings.update(fields)


def group(**fields):
    return lambda settings, tensors: settings["config_groups"]["group_0"]["weights"].update(fields)


def state(**fields):
    def edit(octets):
        return np.frombuffer(json.dumps({**json.loads(octets.tobytes()), **fields}).encode(), np.uint8)

    return change("__nf4", edit)


def shorter(array):
    return array[:-1]


def out_of_range(array):
    return np.where(np.arange(len(array)) == 3, 99, array).astype(array.dtype)


MARLIN = "checkpoint_format='marlin' .*quant_method='gptq'.* is not supported. Supported: 'gptq', 'gptq_v2'"
DAMAGES = [
    (NF4, lose(".absmax"), "no tensor 'model.up.weight.absmax'"),
    (NF4, lose(".nested_quant_map"), "no tensor 'model.up.weight.nested_quant_map'"),
    (NF4, lose("__nf4"), "'model.up.weight' is uint8, and what bitsandbytes stores beside .* is missing"),
    (NF4, change(".absmax", shorter), r"'model.up.weight.absmax' has shape \(63,\), not \(64,\)"),
    (NF4, change("up.weight", shorter), "'model.up.weight' has 2047 bytes"),
    (NF4, change(".quant_map", np.negative), "'model.up.weight.quant_map' is not the table of nf4"),
    (NF4, change("__nf4", shorter), "'model.up.weight.quant_state.bitsandbytes__nf4' is no quant_state"),
    (NF4, state(quant_type="nf5"), "bitsandbytes__nf4' has quant_type='nf5'.*one of nf4, fp4"),
    (NF4, state(blocksize=0), "bitsandbytes__nf4' has .*blocksize=0"),
    (INT8, lose(".SCB"), "'model.up.weight' is int8, and what bitsandbytes stores"),
    (INT8, change(".SCB", shorter), r"'model.up.SCB' has shape \(31,\), not \(32,\)"),
    (INT8, change(".weight_format", lambda one: one + np.uint8(2)), "'model.up.weight_format' is 2: 0, row by row"),
    (GPTQ, lose(".scales"), "no tensor 'model.up.scales'"),
    (GPTQ, lose(".qzeros"), "no tensor 'model.up.qzeros'"),
    (GPTQ, lose(".qweight"), "'model.up.g_idx' is int32, and what gptq stores beside"),
    (GPTQ, say(bits=8), r"'model.up.qzeros' has shape \(8, 4\), not \(8, 8\) as with bits=8"),
    (GPTQ, say(bits=5), "bits=5 .* is not supported. Supported: 2, 3, 4, 8"),
    (GPTQ, say(bits="4"), "bits in the checkpoint's quantization_config is an integer, found '4'"),
    (GPTQ, say(group_size=48), "'model.up.scales' has 8 groups, and with bits=4 .* group_size=48 there are 128"),
    (GPTQ, say(checkpoint_format="marlin"), MARLIN),
    (GPTQ, change(".g_idx", out_of_range), "'model.up.g_idx' names groups 0 to 99, and there are 8"),
    (GPTQ, change(".g_idx", np.negative), "'model.up.g_idx' names groups -7 to 0"),
    (GPTQ, change(".g_idx", shorter), r"'model.up.g_idx' has shape \(127,\)"),
    (GPTQ, change(".qweight", np.float32), "'model.up.qweight' is float32, not int32"),
    (AWQ, lose(".scales"), "no tensor 'model.up.scales'"),
    (AWQ, say(bits=3), "bits=3 .* is not supported. Supported: 4"),
    (AWQ, say(version="gemv"), "version='gemv' .* is not supported. Supported: 'gemm'"),
    (AWQ, say(group_size=48), "'model.up.qweight' has 128 inputs, which group_size=48 does not divide"),
    (AWQ, say(group_size=32), r"'model.up.qzeros' has shape \(8, 4\), not \(4, 4\)"),
    (INT4, lose(".weight_scale"), "no tensor 'model.up.weight_scale'"),
    (INT4, lose(".weight_shape"), "no tensor 'model.up.weight_shape'"),
    (INT4, lose(".weight_zero_point"), "'model.up.weight_zero_point' is missing, and the weights are not symmetric"),
    (INT4, group(num_bits=8), r"'model.up.weight_packed' has shape \(32, 16\), not \(32, 32\)"),
    (INT4, group(group_size=48), "'model.up.weight_scale' has 128 inputs, which group_size=48 does not divide"),
    (INT4, group(group_size=32), r"'model.up.weight_scale' has shape \(32, 8\), not \(32, 4\)"),
    (INT4, say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format='sparse-24-bitmask'"),
    (INT4, say(transform_config={"config_groups": {"u": {}}}), "transform_config=.* is not supported"),
    (FP8, lose(".weight_scale_inv"), "no tensor 'model.up.weight_scale_inv'"),
    (FP8, change("_inv", shorter), r"'model.up.weight_scale_inv' has shape \(1, 4\), .* each block of \[16, 32\]"),
    (FP8, say(weight_block_size=[32, 32]), "'model.up.weight_scale_inv' .* each block of .32, 32."),
    ("int-quantized int8 tensor asymmetric float32", lose("_scale"), "'model.up.weight' is int8, and what compressed-"),
    ("mxfp4", lose("_scales"), "no tensor 'model.up_scales'"),
    ("mxfp4", change("_scales", shorter), r"'model.up_scales' has shape \(1, 128, 1\), not \(2, 128, 1\)"),
    ("torchao int8", lose("_scale"), "no tensor 'model.up._weight_scale'"),
    ("torchao intx", change("_scale", shorter), r"'model.up._weight_scale' has shape \(31, 4\)"),
    ("torchao int4", change("_qdata", shorter), r"'model.up._weight_scale' has shape \(4, 32\), not \(4, 31\)"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES, ids=[f"{name} {m}" for name, _, m in DAMAGES])
def test_damaged_files_get_one_line_that_names_the_tensor(name, damage, message, tmp_path):
    settings, tensors, _ = put_in_file(tmp_path, name)
    settings = json.loads(json.dumps(settings))
    damage(settings, tensors)
    with pytest.raises(ValueError, match=message) as raised:
        read_quantized(settings, tensors, open_metadata(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("Int4TilePackedTo4dTensor", "the layout of 'model.up.weight'='Int4TilePackedTo4dTensor' .* not supported"),
        (None, "no description of torchao's tensors in their headers"),
    ],
)
def test_layouts_of_torchao_that_are_not_read(layout, message, tmp_path):
    settings, tensors, _ = put_in_file(tmp_path, "torchao int4")
    texts = open_metadata(tmp_path)
    about = {**json.loads(texts["model.up.weight"]), "_type": layout}
    texts = {**texts, "model.up.weight": json.dumps(about)} if layout else {}
    with pytest.raises(ValueError, match=message):
        read_quantized(settings, tensors, texts)


def test_formats_of_compressed_tensors_that_are_not_read(tmp_path):
    _, tensors, _ = put_in_file(tmp_path, INT4)
    settings = compressed_settings(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    with pytest.raises(
        ValueError, match="format='nvfp4-pack-quantized' .* is not supported. Supported: 'pack-quantized'"
    ):
        read_quantized(settings, tensors)


def test_a_method_that_is_not_read_is_told_which_are(tmp_path):
    model = torch_llama()
    model.config.quantization_config = {"quant_method": "aqlm"}
    save(tmp_path, model, Format({"quant_method": "aqlm"}, FORMATS[GPTQ].write))
    message = f"quant_method='aqlm', which is not supported. Supported: {', '.join(READ)}. Load one of these"
    with pytest.raises(ValueError, match=message):
        pj.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization_config in config.json is an object, found 'gptq'"):
        check_quant_method("gptq")


def test_a_weight_is_there_once(tmp_path):
    settings, tensors, want = put_in_file(tmp_path, GPTQ)
    with pytest.raises(ValueError, match="'model.up.weight' is there twice, quantized and not"):
        read_quantized(settings, {**tensors, "model.up.weight": want.numpy()})


def test_values_that_are_not_finite_are_found(tmp_path):
    save(tmp_path, torch_llama(), FORMATS[GPTQ])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'model.layers.1.self_attn.q_proj.weight' holds NaN or infinity in"):
        load_all(tmp_path)


def test_a_weight_converts_as_arrays_do(tmp_path):
    settings, tensors, want = put_in_file(tmp_path, GPTQ)
    weight = read_quantized(settings, tensors)[0]["model.up.weight"]
    assert jnp.asarray(np.asarray(weight, np.float32)).dtype == jnp.float32 and len(weight) == 32
    assert jax.tree.leaves(weight) == [weight]
