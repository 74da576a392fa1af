"""Quantized checkpoints that stay in their own bits: values, whole models, training, merging and bytes."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf_files import Kind, write_gguf
from peft_jax.interop.files import open_metadata, open_tensors, read_config
from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.interop.packed_codes import Kept, kept_weight
from peft_jax.interop.quantized import read_quantized
from quantized_writers import FORMATS, random_weight, save, split
from safetensors.torch import load_file, save_file
from test_quantized_files import IDS, torch_llama

import peft_jax as pj
from peft_jax.cli.demo_data import HELD_OUT, MODEL
from peft_jax.cli.main import main
from peft_jax.quant import FP4, NF4, Int4, Int8, Int8Groups, Quantized, nbytes
from peft_jax.quant.rounded_to import rounded_to

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# What each format of the writers is kept as. The others have no weight of the same values.
KEPT = {
    "bitsandbytes nf4 bfloat16": NF4,
    "bitsandbytes nf4 nested float16": NF4,
    "bitsandbytes nf4 nested float32": NF4,
    "bitsandbytes fp4 float32": FP4,
    "bitsandbytes fp4 nested bfloat16": FP4,
    "bitsandbytes nf4 stored as bfloat16": NF4,
    "bitsandbytes int8": Int8,
    "gptq int4 by 16 v1 symmetric": Int4,
    "gptq int4 by -1 v2": Int4,
    "gptq int8 by 32 v2 symmetric": Int8Groups,
    "gptq int3 by 16 v2 symmetric": Int4,
    "gptq without g_idx, bfloat16": Int4,
    "awq by 16": Int4,
    "awq by -1": Int4,
    "pack-quantized int4 group bfloat16": Int4,
    "pack-quantized int4 group asymmetric float16": Int4,
    "pack-quantized int4 channel asymmetric float32": Int4,
    "pack-quantized int8 channel bfloat16": Int8Groups,
    "pack-quantized int8 group asymmetric bfloat16": Int8Groups,
    "pack-quantized int3 group asymmetric bfloat16": Int4,
    "int-quantized int8 channel bfloat16": Int8Groups,
    "int-quantized int8 tensor asymmetric float32": Int8Groups,
    "torchao int8": Int8Groups,
    "torchao intx": Int8Groups,
}
LAYOUT = pj.Layout()
INT4_BY_GROUP = "pack-quantized int4 group asymmetric float16"


def put_in_file(folder, name, weight):
    form = FORMATS[name]
    written, want = form.write("model.up", weight)
    parts, texts = split(written)
    save_file(parts, folder / "model.safetensors", metadata=texts or None)
    tensors, _ = read_quantized(form.settings, open_tensors(folder, packed=True), open_metadata(folder))
    return next(iter(tensors.values())), want.float().numpy()


def kept(tensor, dtype, layout=LAYOUT):
    return jax.jit(lambda codes: kept_weight(codes, Kept(tensor.form(), layout, jnp.dtype(dtype))))(tensor.codes())


@pytest.mark.parametrize("name", FORMATS)
def test_a_kept_weight_has_the_values_of_the_formats_own_reader(name, tmp_path):
    """In float32 as in the weight's own element type, compiled or not; rows as an embedding has them, too."""
    tensor, want = put_in_file(tmp_path, name, random_weight(32, 128))
    if name not in KEPT:
        assert tensor.form() is None
        return
    for dtype in {"float32", tensor.dtype.name}:
        weight = kept(tensor, dtype)
        assert type(weight) is KEPT[name] and weight.dtype == dtype and weight.shape == want.shape[::-1]
        for dense in (weight.dense(), jax.jit(lambda one: one.dense())(weight)):
            np.testing.assert_array_equal(np.asarray(dense.astype(jnp.float32)).T, want)
    x = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    wanted = x @ want.T
    np.testing.assert_allclose(jax.jit(lambda w, x: w.apply(x))(kept(tensor, "float32"), x), wanted, atol=1e-5)
    if isinstance(weight, Int8):
        return
    np.testing.assert_array_equal(kept(tensor, "float32").rows(np.array([0, 77])), want.T[[0, 77]])


def test_what_is_not_kept_is_of_these_kinds():
    assert KEPT.keys() <= FORMATS.keys()
    rest = {name.split()[0] for name in FORMATS if name not in KEPT}
    assert rest == {"gptq", "float-quantized", "naive-quantized", "fp8", "fbgemm_fp8", "mxfp4", "torchao"}
    act_order = [name for name in FORMATS if name.startswith("gptq") and name not in KEPT]
    assert all("act-order" in name for name in act_order)


@pytest.mark.parametrize("shape", [(6, 50), (5, 7)])
@pytest.mark.parametrize("name", ["bitsandbytes fp4 float32", "bitsandbytes nf4 nested float16"])
def test_blocks_that_run_on(name, shape, tmp_path):
    """Against our own dequantization of the file: bitsandbytes' CPU kernel reads other scales there."""
    tensor, _ = put_in_file(tmp_path, name, random_weight(*shape))
    np.testing.assert_array_equal(kept(tensor, "float32").dense().T, np.asarray(tensor, np.float32))


def test_act_order_whose_groups_are_runs_of_inputs(tmp_path):
    """Groups in another order; ``weight_g_idx`` of compressed-tensors is the same."""
    for name, ending in [("gptq int4 by 16 v1 symmetric", "g_idx"), (INT4_BY_GROUP, "weight_g_idx")]:
        form = FORMATS[name]
        parts, _ = form.write("model.up", random_weight(32, 128))
        parts = {key: tensor.numpy() for key, tensor in parts.items()}
        runs = np.repeat(np.random.default_rng(0).permutation(8).astype(np.int32), 16)
        tensor = read_quantized(form.settings, {**parts, f"model.up.{ending}": runs})[0]["model.up.weight"]
        np.testing.assert_array_equal(kept(tensor, "float32").dense().T, np.asarray(tensor, np.float32))
        mixed = np.random.default_rng(0).permutation(runs)
        assert (
            read_quantized(form.settings, {**parts, f"model.up.{ending}": mixed})[0]["model.up.weight"].form() is None
        )


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_blocks_of_gguf(kind):
    if kind.name not in ("Q4_0", "Q8_0"):
        assert GGUFTensor("t", np.zeros((2, 2), np.uint8), kind).form() is None
        return
    weight = random_weight(6, 64).numpy()
    stored = gguf.quantize(weight, kind)
    values = gguf.dequantize(stored, kind)
    order = np.array([3, 2, 1, 0, 5, 4])
    tensor = GGUFTensor("t", stored, kind).reordered(order)
    np.testing.assert_array_equal(kept(tensor, "float32").dense().T, values[order])
    assert tensor.transposed().form().is_transposed and tensor.plus(1.0).form() is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_that_of_numpy(dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20000) * 10.0 ** rng.uniform(-9, 6, 20000)).astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda a: rounded_to(a, jnp.dtype(dtype)))(x), want)


# -- whole models --------------------------------------------------------------------------------------

WHOLE = [
    *("bitsandbytes nf4 nested float16", "bitsandbytes fp4 float32", "bitsandbytes int8"),
    *("gptq int4 by 16 v1 symmetric", "gptq int8 by 32 v2 symmetric", "awq by 16", INT4_BY_GROUP),
    *("int-quantized int8 channel bfloat16", "torchao int8"),
]
TRAINED = ["bitsandbytes nf4 nested float16", "bitsandbytes int8", "awq by 16"]
MODULES = {"mlp": ("gate_proj", "up_proj", "down_proj"), "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}


def keep(folder, **options):
    """Our model, and what the warning says."""
    with pytest.warns(UserWarning, match="stay in their own bits") as said:
        model = pj.AutoModelForCausalLM.from_pretrained(folder, keep_quantized=True, **options)
    return model, str(said[0].message)


def kernels(params):
    """The leaves of the layers' matrices by the names that their modules have in a layer."""
    layers = params["model"]["layers"]
    return {f"{part}.{name}": layers[part][name]["kernel"] for part, names in MODULES.items() for name in names}


@jax.jit
def dense(leaves):
    return {name: leaf.dense() for name, leaf in leaves.items()}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_is_kept_in_the_bytes_of_its_numbers_and_scales(name, tmp_path):
    want = save(tmp_path, torch_llama(), FORMATS[name])
    model, said = keep(tmp_path, dtype="float32")
    leaves = kernels(model.params)
    assert {type(leaf) for leaf in leaves.values()} == {KEPT[name]}
    for module, values in dense(leaves).items():
        for layer in range(2):
            weight = want[f"model.layers.{layer}.{module}.weight"].float().numpy()
            np.testing.assert_array_equal(np.asarray(values[layer]).T, weight, err_msg=module)
    in_a_byte = 1 if KEPT[name] in (Int8, Int8Groups) else 2
    for leaf in leaves.values():
        count = np.prod(leaf.shape)
        assert leaf.array.nbytes * in_a_byte == count, "the file's own bits"
        assert nbytes(leaf) - leaf.array.nbytes <= count * 5 / 16, "a float and a zero point for 16 numbers"
    assert f"14 of them stay in their own bits in {nbytes(leaves):,} bytes." in said


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_on_a_kept_model_does_as_on_the_dequantized_one(name, tmp_path):
    """Logits, gradients, and merging."""
    save(tmp_path, torch_llama(), FORMATS[name])
    with pytest.warns(UserWarning, match="dequantized to"):
        plain = pj.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    config = pj.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    found, wanted = (
        pj.get_peft_model(one, config, key=jax.random.key(1)) for one in (keep(tmp_path, dtype="float32")[0], plain)
    )
    for one, other in zip(trained_once(found), trained_once(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))
    merged, other = kernels(pj.merge(found.params)), kernels(pj.merge(wanted.params))
    for module in merged:
        np.testing.assert_allclose(merged[module], other[module], atol=1e-6, err_msg=module)


@jax.jit
def step(trainable, frozen):
    """Logits, and the adapter after a step of gradient descent; arguments, so that all plain models share a program."""

    def loss(trainable):
        logits = pj.combine(trainable, frozen)(IDS).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

    gradients, logits = jax.grad(loss, has_aux=True)(trainable)
    return logits, jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, trainable, gradients)


def trained_once(model):
    """Logits, those after a step of gradient descent, and the adapter then."""
    trainable, frozen = pj.partition(model)
    before, trainable = step(trainable, frozen)
    after, _ = step(trainable, frozen)
    assert np.abs(before - after).max() > 1e-3
    return [before, after, *jax.tree.leaves(trainable)]


def test_what_does_not_fit_is_dequantized_and_named(tmp_path):
    """Groups in no order; a head that is quantized, as transformers keeps one, is kept."""
    name = "gptq int4 by 16 v1 act-order"
    save(tmp_path, torch_llama(), FORMATS[name])
    model, said = keep(tmp_path, dtype="float32")
    assert not any(isinstance(leaf, Quantized) for leaf in kernels(model.params).values())
    elements = sum(leaf.size for leaf in kernels(model.params).values())
    assert "0 of them stay in their own bits in 0 bytes; 14 are dequantized to float32 in" in said
    assert f"in {4 * elements:,} bytes: model.layers.0.mlp.down_proj.weight" in said
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.up_proj.g_idx"] = torch.arange(64, dtype=torch.int32) // 16
    tensors["model.layers.1.mlp.gate_proj.g_idx"] = torch.arange(64, dtype=torch.int32) // 16
    save_file(tensors, tmp_path / "model.safetensors")
    model, said = keep(tmp_path, dtype="float32")
    found = [name for name, leaf in kernels(model.params).items() if isinstance(leaf, Quantized)]
    assert found == ["mlp.up_proj"], "a leaf has one form for all layers"
    assert "2 of them stay in their own bits" in said and "12 are dequantized" in said


def test_a_quantized_head_is_kept(tmp_path):
    save(tmp_path, torch_llama(), FORMATS["bitsandbytes nf4 bfloat16"], every="lm_head")
    model, said = keep(tmp_path)
    assert isinstance(model.params["lm_head"]["kernel"], NF4) and "1 of them stay in their own bits" in said


def test_matrices_that_plain_checkpoints_store_the_other_way_round(tmp_path):
    """GPT-2's."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": quantization}
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(
        tmp_path / "quantized"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dequantize()
    model, _ = keep(tmp_path / "quantized", dtype="float32")
    leaf = model.params["transformer"]["h"]["mlp"]["c_fc"]["kernel"]
    assert isinstance(leaf, NF4)
    for layer, block in enumerate(theirs.transformer.h):
        np.testing.assert_array_equal(leaf.dense()[layer].T, block.mlp.c_fc.weight.detach().float().numpy())


def test_a_gguf_file_is_kept(tmp_path):
    config = pj.models.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    hf, tensors = read_config(tmp_path / "hf"), open_tensors(tmp_path / "hf")

    def kind_of(name):
        if "attn_v" in name:
            return Kind.Q4_1
        return Kind.Q4_0 if "ffn" in name else Kind.Q8_0

    write_gguf(tmp_path / "x.gguf", "llama", hf, tensors, kind_of)
    with pytest.warns(UserWarning, match="are dequantized from"):
        plain = kernels(pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf").params)
    model, said = keep(tmp_path, gguf_file="x.gguf")
    assert "weights quantized as Q4_0, Q4_1, Q8_0 in" in said
    for module, leaf in kernels(model.params).items():
        if "v_proj" in module:
            np.testing.assert_array_equal(leaf, plain[module])
            continue
        assert type(leaf) is (Int4 if "mlp" in module else Int8Groups) and leaf.group_size == 32
        np.testing.assert_array_equal(leaf.dense(), plain[module])
    assert "model.layers.0.self_attn.v_proj.weight" in said


# -- what is refused -----------------------------------------------------------------------------------


def test_options_that_exclude_each_other(tmp_path):
    save(tmp_path, torch_llama(), FORMATS["awq by 16"])
    read = pj.AutoModelForCausalLM.from_pretrained
    config = pj.BitsAndBytesConfig(load_in_4bit=True)
    for other in ({"load_in_8bit": True}, {"load_in_4bit": True}, {"quantization_config": config}):
        with pytest.raises(ValueError, match=f"keep_quantized=True and {next(iter(other))}.* exclude each other"):
            read(tmp_path, keep_quantized=True, **other)
    torch_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="keep_quantized=True, but '.*plain' holds no quantized weights. Leave it out"):
        read(tmp_path / "plain", keep_quantized=True)


@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "--data", str(HELD_OUT), "--output", "job", "--max-steps", "1", "--keep-quantized"],
        ["generate", "a prompt", "--keep-quantized"],
        ["eval", "--data", str(HELD_OUT), "--keep-quantized"],
    ],
    ids=lambda command: command[0],
)
def test_the_commands_hand_the_flag_to_the_reader(command, tmp_path, monkeypatch, capsys):
    """Which says that there is nothing to keep."""
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "--model", str(MODEL), *command[1:]]) != 0
    assert "keep_quantized=True, but" in capsys.readouterr().err


def test_values_that_are_not_finite_are_found(tmp_path):
    save(tmp_path, torch_llama(), FORMATS["awq by 16"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'model.layers.1.self_attn.q_proj.weight' holds NaN or infinity in"):
        pj.AutoModelForCausalLM.from_pretrained(tmp_path, keep_quantized=True)
