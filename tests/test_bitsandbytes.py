"""NF4, FP4 and double quantization against bitsandbytes, QLoRA and LoftQ against PEFT, and transformers' options."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_training import train_in_peft

import peft_jax as pj
from peft_jax import train
from peft_jax.cli.shared.forward_pass import apply
from peft_jax.quant import FP4, NF4, DoubleScale, Int8
from peft_jax.quant.double_scale import VALUES, double_quantize

torch = pytest.importorskip("torch")
with warnings.catch_warnings(action="ignore"):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(128, 96), (64, 7), (32, 24), (30, 24), (33, 5)]  # (in, out); 64 does not divide the last three's inputs
FORMATS: dict[str, Any] = {"nf4": NF4, "fp4": FP4}


def theirs(weight: np.ndarray, kind: str, double: bool = False) -> tuple[Any, Any]:
    """bitsandbytes' bytes and state of ``(in, out)``."""
    with warnings.catch_warnings(action="ignore"):
        found: tuple[Any, Any] = bitsandbytes.quantize_4bit(
            torch.tensor(weight.T.copy()), quant_type=kind, compress_statistics=double
        )
    return found


def codes_of(packed: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers in bitsandbytes' bytes, ``(in, out)``: of two neighbours the first is in the upper half."""
    flat = packed.numpy().ravel()
    return np.stack([flat >> 4, flat & 15], 1).ravel()[: shape[0] * shape[1]].reshape(shape[::-1]).T


def values_of(packed: Any, state: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What these bytes stand for: by the library where 64 divides the inputs, else by its table.

    Elsewhere the library's kernel for CPUs is wrong (0.50.2): its errors are larger than the blocks' largest element.
    """
    if shape[0] % 64 == 0:
        return bitsandbytes.dequantize_4bit(packed, state).float().numpy().T
    scale = state.absmax
    if state.nested:
        scale = bitsandbytes.dequantize_blockwise(scale, state.state2) + state.offset
    flat = state.code.numpy()[codes_of(packed, shape)].T.ravel()
    return (flat * scale.numpy()[np.arange(flat.size) // 64]).reshape(shape[::-1]).T


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed, state = theirs(weight, kind)
    want = values_of(packed, state, shape)
    ours = FORMATS[kind].of(jnp.array(weight), pj.Layout())
    np.testing.assert_array_equal(ours.dense(), want)
    np.testing.assert_array_equal(jax.jit(lambda weight: weight.dense())(ours), want)
    scale = state.absmax.numpy()
    scale = scale if shape[0] % 64 else scale.reshape(shape[1], -1).T
    read = FORMATS[kind].from_codes(jnp.array(codes_of(packed, shape)), jnp.array(scale), "float32")
    np.testing.assert_array_equal(read.dense(), want)
    assert jax.tree.structure(read) == jax.tree.structure(ours)
    for dtype in ("bfloat16", "float16"):
        found = FORMATS[kind].of(jnp.array(weight, dtype), pj.Layout())
        narrow = torch.tensor(weight.T.copy()).to(getattr(torch, dtype))
        packed, state = bitsandbytes.quantize_4bit(narrow, quant_type=kind)
        want = values_of(packed, state, shape)
        np.testing.assert_array_equal(found.dense(), want.astype(found.dtype))


@pytest.mark.parametrize("shape", [(128, 96), (192, 384), (30, 24)], ids=str)
def test_double_quantization_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    np.testing.assert_array_equal(VALUES, bitsandbytes.create_dynamic_map().numpy())
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed, state = theirs(weight, "nf4", double=True)
    ours = NF4.of(jnp.array(weight), pj.Layout(), double_quant=True)
    # The mean of the scales is summed in another order, on each of bitsandbytes' devices too.
    np.testing.assert_allclose(ours.scale.offset, state.offset.numpy(), rtol=3e-7)

    # A file's scales: the same values to the last bit.
    order = (lambda flat: flat) if shape[0] % 64 else (lambda flat: flat.reshape(shape[1], -1).T)
    codes, largest = order(state.absmax.numpy()), jnp.array(state.state2.absmax.numpy())
    scale = DoubleScale(jnp.array(codes), largest, jnp.array(state.offset.numpy()))
    read = NF4.from_codes(jnp.array(codes_of(packed, shape)), scale, "float32")
    want = values_of(packed, state, shape)
    np.testing.assert_array_equal(read.dense(), want)
    np.testing.assert_array_equal(jax.jit(lambda weight: weight.dense())(read), want)

    # Rounding by the same mean: the nearest value, as bitsandbytes' own definition in Python (backends/default) takes
    # it. Its kernel for CPUs takes the second nearest of 0.2 % of the scales (0.50.2).
    plain = NF4.of(jnp.array(weight), pj.Layout()).scale
    found = double_quantize(plain, 0, state.offset.numpy())
    np.testing.assert_array_equal(found.largest, largest)
    flat = (np.asarray(plain).T.ravel() if plain.ndim == 2 else np.asarray(plain)) - state.offset.numpy()
    scaled = flat * (np.float32(1) / np.asarray(largest))[np.arange(flat.size) // 256]
    nearest = np.abs(scaled[:, None] - VALUES[None]).argmin(1)
    np.testing.assert_array_equal(found.codes, order(nearest))
    assert np.mean(found.codes != codes) < 0.01
    np.testing.assert_allclose(ours.dense(), want, rtol=0, atol=0.01 * np.abs(weight).max())


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, max_position_embeddings=32, initializer_range=0.2, **SIZES)
    ).save_pretrained(folder)
    return folder


def kernel(model: Any, name: str) -> Any:
    block, module = name.split(".")
    return model.params["model"]["layers"][block][module]["kernel"]


def test_qlora_steps_are_those_of_peft_on_the_dequantized_model(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32", load_in_4bit=True)
    assert isinstance(kernel(model, "self_attn.q_proj"), NF4)
    pj.merge(model).save_pretrained(tmp_path / "dequantized")
    config = pj.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = pj.get_peft_model(pj.prepare_model_for_kbit_training(model), config)
    model.save_pretrained(tmp_path / "start")
    draw = np.random.default_rng(0)
    batches = []
    for _ in range(3):
        ids = draw.integers(2, 60, (4, 10)).astype(np.int32)
        batches.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids})

    optimizer = optax.adamw(1e-2, weight_decay=0.01)
    state, frozen = train.start(model, optimizer, seed=0)
    step, got = train.make_training_step(apply, optimizer), []
    for _, metrics in train.train(step, state, frozen, batches, max_steps=3):
        got.append(float(metrics.loss))
    with warnings.catch_warnings(action="ignore"):
        other = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dequantized", dtype=torch.float32, attn_implementation="eager"
        )
        other = PeftModel.from_pretrained(other, tmp_path / "start", is_trainable=True)
        want = train_in_peft(other, batches, 1e-2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(set(got)) == 3


@pytest.mark.parametrize("load", ["load_in_4bit", "load_in_8bit"])
def test_loftq_starts_from_the_quantized_base_as_peft_does(base: Path, load: str) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    exact = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32", **{load: True})
    config = pj.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    before = pj.get_peft_model(model, config)
    seen = []
    after = pj.replace_lora_weights_loftq(before, callback=lambda _, path: seen.append(path) or "down" not in path)
    assert [path.split(".")[-2] for path in seen] == ["down_proj", "q_proj"]
    kept, leaf = kernel(after, "mlp.down_proj"), kernel(after, "self_attn.q_proj")
    np.testing.assert_array_equal(kept.params["lora_A"], kernel(before, "mlp.down_proj").params["lora_A"])
    assert leaf.base is kernel(before, "self_attn.q_proj").base
    for layer in range(2):
        weight = np.asarray(kernel(exact, "self_attn.q_proj")[layer])
        if load == "load_in_4bit":
            packed, state = theirs(weight, "nf4")
            rounded = values_of(packed, state, weight.shape)
        else:
            ints, scales, _ = bitsandbytes.int8_vectorwise_quant(torch.tensor(weight.T.copy()).half().float().half())
            rounded = np.asarray(leaf.base.dense()[layer])
            assert np.mean(ints.numpy().T == np.asarray(leaf.base.q[layer])) > 0.99
        found = _low_rank_decomposition(torch.tensor((weight - rounded).T), reduced_rank=4)
        a, b = leaf.params["lora_A"][layer], leaf.params["lora_B"][layer]
        want = (found["L"] @ found["R"]).numpy().T
        np.testing.assert_allclose(a @ b, want, rtol=0, atol=1e-5)
        signs = np.sign(np.sum(np.asarray(b) * found["L"].numpy().T, axis=1))
        np.testing.assert_allclose(np.asarray(a) * signs[None], found["R"].numpy().T, rtol=0, atol=1e-4)
        lost = np.linalg.norm(weight - rounded)
        assert np.linalg.norm(weight - rounded - a @ b) < 0.9 * lost
    with pytest.raises(ValueError, match="No leaf has a LoRA named 'other' on a quantized weight"):
        pj.replace_lora_weights_loftq(after, adapter_name="other")
    with pytest.raises(ValueError, match="No leaf has a LoRA named 'default'"):
        pj.replace_lora_weights_loftq(pj.get_peft_model(exact, config))


def test_options_are_those_of_transformers() -> None:
    from transformers import BitsAndBytesConfig

    other = BitsAndBytesConfig(load_in_4bit=True)
    ours = pj.BitsAndBytesConfig(load_in_4bit=True)
    for field in dataclasses.fields(ours):
        want, got = getattr(other, field.name), getattr(ours, field.name)
        resolved = {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8"}.get(field.name)
        assert str(want).removeprefix("torch.") == (str(got) if resolved is None else resolved), field.name
    quantizer = ours.quantizer()
    assert quantizer is not None and (quantizer.kind, quantizer.compute_dtype) == ("fp4", jnp.float32)


def test_a_config_decides_what_is_rounded_to_what(base: Path) -> None:
    def load(**options: Any) -> Any:
        config = pj.BitsAndBytesConfig(load_in_4bit=True, **options)
        return pj.AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16", quantization_config=config)

    model = load()
    leaf = kernel(model, "mlp.up_proj")
    assert isinstance(leaf, FP4) and isinstance(model.params["lm_head"]["kernel"], jax.Array)
    exact = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    np.testing.assert_array_equal(
        leaf.astype("float32").dense()[1], FP4.of(kernel(exact, "mlp.up_proj")[1], pj.Layout()).dense()
    )
    x = jax.random.normal(jax.random.key(0), (3, 64)).astype(jnp.bfloat16)
    one = jax.tree.map(lambda array: array[0], leaf).relaid(pj.Layout())
    wide = one.astype("float32").dense()
    np.testing.assert_array_equal(one.apply(x), (x.astype(jnp.float32) @ wide).astype(jnp.bfloat16))
    narrow = dataclasses.replace(one, compute_dtype=jnp.dtype("bfloat16")).apply(x)
    assert narrow.dtype == jnp.bfloat16 and np.any(narrow != one.apply(x))

    model = load(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["up_proj", "model.layers.*.self_attn.q_proj"],
    )
    assert isinstance(kernel(model, "mlp.up_proj"), jax.Array) and isinstance(
        kernel(model, "self_attn.q_proj"), jax.Array
    )
    leaf = kernel(model, "mlp.down_proj")
    assert isinstance(leaf.scale, DoubleScale) and leaf.compute_dtype == jnp.bfloat16
    assert isinstance(model.params["lm_head"]["kernel"], NF4), (
        "a list without the head has it rounded, as in transformers"
    )
    ids = np.array([[5, 17, 2]])
    dense = pj.merge(model)
    np.testing.assert_allclose(
        np.asarray(model(ids).logits, np.float32), np.asarray(dense(ids).logits, np.float32), rtol=0, atol=0.1
    )
    int8 = pj.AutoModelForCausalLM.from_pretrained(base, quantization_config=pj.BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(kernel(int8, "mlp.up_proj"), Int8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_int8_threshold": 0.0}, "llm_int8_threshold=0.0.* has no meaning here"),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "llm_int8_enable_fp32_cpu_offload=True.* has no meaning here"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True.* has no meaning here"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16'.* has no meaning here"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both True, but only one"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4' is not supported. Write one of nf4, fp4"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype='int8' is not supported"),
        ({"llm_int8_skip_modules": "lm_head"}, "Write a list of modules' names"),
    ],
)
def test_options_without_a_meaning_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pj.BitsAndBytesConfig(**options)


def test_what_is_loaded_in_two_ways_or_none_is_named(base: Path) -> None:
    def load(**options: Any) -> Any:
        return pj.AutoModelForCausalLM.from_pretrained(base, **options)

    config = pj.BitsAndBytesConfig(load_in_4bit=True)
    for options in (
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_8bit": True, "quantization_config": config},
    ):
        with pytest.raises(ValueError, match="exclude each other. Give one of them"):
            load(**options)
    with pytest.raises(ValueError, match="quantizes nothing"):
        load(quantization_config=pj.BitsAndBytesConfig())
    with pytest.raises(ValueError, match=r"quantization_config is a builtins.dict.*pj.BitsAndBytesConfig"):
        load(quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match="names 1 of the 2 layers"):
        config = pj.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.1.mlp"])
        load(quantization_config=config)


def test_preparing_for_training_is_pefts_as_far_as_it_goes(base: Path) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16", load_in_4bit=True)
    ready = pj.prepare_model_for_kbit_training(model)
    assert ready.remat and not model.remat and not pj.prepare_model_for_kbit_training(model, False).remat
    assert kernel(ready, "mlp.up_proj") is kernel(model, "mlp.up_proj")
    arrays = [leaf for leaf in jax.tree.leaves(ready.params, is_leaf=lambda node: isinstance(node, NF4))]
    assert {leaf.dtype for leaf in arrays if not isinstance(leaf, NF4)} == {jnp.dtype("float32")}
    plain = pj.prepare_model_for_kbit_training(pj.AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"))
    assert not plain.remat and plain.params["lm_head"]["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs=.*use_reentrant.*Leave them out"):
        pj.prepare_model_for_kbit_training(model, True, {"use_reentrant": False})
    with pytest.raises(ValueError, match="auto_clear_cache=False"):
        pj.prepare_model_for_kbit_training(model, auto_clear_cache=False)
    with pytest.raises(ValueError, match="has adapters already"):
        pj.prepare_model_for_kbit_training(pj.get_peft_model(model, pj.LoraConfig(target_modules=["q_proj"])))
