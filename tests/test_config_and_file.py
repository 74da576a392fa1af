"""The config decides what an adapter's file means, as in PEFT; what the file has beyond it, or lacks, is named."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import peft_jax as pj
from peft_jax.cli.main import main

IDS = np.array([[5, 17, 2, 40, 9, 61, 33]])
QV = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=QV),
    "bias": peft.LoraConfig(r=4, target_modules=QV, bias="all"),
    "saved": peft.LoraConfig(r=4, target_modules=QV, modules_to_save=["norm"]),
    "dora": peft.LoraConfig(r=4, target_modules=QV, use_dora=True),
    "lora_bias": peft.LoraConfig(r=4, target_modules=QV, lora_bias=True),
    "tokens": peft.LoraConfig(r=4, target_modules=QV, trainable_token_indices=[3, 5]),
    "parameter": peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["v_proj.weight"]),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(r=4, target_modules=QV),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "loha": peft.LoHaConfig(r=4, target_modules=QV),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[3, 5]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
}
# By case: the adapter, what is changed in its config, and what the error names; None where it loads, as in PEFT.
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    **{f"{name} as saved": (name, {}, None) for name in ADAPTERS},
    "targets by the model's default": ("lora", {"target_modules": None}, None),
    "a target too many": ("lora", {"target_modules": [*QV, "query"]}, None),
    "surplus modules": ("lora", {"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj"),
    "surplus to a regex": ("lora", {"target_modules": ".*q_proj"}, "layers.1.self_attn.v_proj"),
    "excluded modules": ("lora", {"exclude_modules": ["v_proj"]}, "layers.1.self_attn.v_proj"),
    "surplus layers": ("lora", {"layers_to_transform": [0]}, "layers.1.self_attn.q_proj"),
    "surplus layers of a list": (
        "lora",
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        "layers.0.self_attn.v_proj",
    ),
    "no targets": ("lora", {"target_modules": []}, "self_attn.q_proj"),
    "no such targets": ("lora", {"target_modules": ["query"]}, "self_attn.q_proj"),
    "missing modules": ("lora", {"target_modules": [*QV, "o_proj"]}, "layers.0.self_attn.o_proj"),
    "missing linear modules": ("lora", {"target_modules": "all-linear"}, "layers.0.mlp.down_proj"),
    "missing saved modules": ("lora", {"modules_to_save": ["lm_head"]}, "lm_head"),
    "surplus saved modules": ("saved", {"modules_to_save": None}, "post_attention_layernorm"),
    "surplus biases": ("bias", {"bias": "none"}, "k_proj.bias"),
    "biases of other modules": ("bias", {"bias": "lora_only"}, "k_proj.bias"),
    "missing biases": ("lora", {"bias": "all"}, "k_proj.bias"),
    "other ranks": ("lora", {"rank_pattern": {"v_proj": 2}}, "layers.0.self_attn.v_proj"),
    "surplus magnitudes": ("dora", {"use_dora": False}, "q_proj.lora_magnitude_vector"),
    "missing magnitudes": ("lora", {"use_dora": True}, "q_proj.lora_magnitude_vector"),
    "surplus LoRA biases": ("lora_bias", {"lora_bias": False}, "q_proj.lora_B.bias"),
    "surplus tokens": ("tokens", {"trainable_token_indices": None}, "trainable_tokens_delta"),
    "fewer tokens": ("tokens", {"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    "missing tokens": ("lora", {"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    "a surplus parameter": ("parameter", {"target_parameters": None}, "layers.0.self_attn.v_proj"),
    "a missing parameter": ("lora", {"target_parameters": ["o_proj.weight"]}, "layers.0.self_attn.o_proj"),
    "a surplus embedding": ("embedding", {"target_modules": ["q_proj"]}, "embed_tokens.lora_embedding_A"),
    "surplus vectors": ("ia3", {"target_modules": ["k_proj"], "feedforward_modules": []}, "mlp.down_proj"),
    "vectors of outputs": ("ia3", {"feedforward_modules": []}, "mlp.down_proj.ia3_l"),
    "surplus VeRA": ("vera", {"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj"),
    "surplus norms": ("norms", {"target_modules": ["norm"]}, "layers.0.input_layernorm"),
    "surplus LoHa": ("loha", {"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj"),
    "fewer trainable tokens": ("trainable tokens", {"token_indices": [3]}, "trainable_tokens_delta"),
    "fewer virtual tokens": ("prompt", {"num_virtual_tokens": 2}, "prompt_embeddings"),
    "a prompt's surplus head": ("prompt", {"modules_to_save": None}, "lm_head.weight"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that PyTorch wrote, and adapters of it with random numbers."""
    made = tmp_path_factory.mktemp("config-and-file")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(made / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in ADAPTERS.items():
            peft.get_peft_model(LlamaForCausalLM.from_pretrained(made / "base"), config).save_pretrained(made / name)
    draw = np.random.default_rng(0)
    for name in ADAPTERS:
        file = made / name / "adapter_model.safetensors"
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if "base_layer.weight" not in key and "vera_A" not in key and "vera_B" not in key:
                tensors[key] = tensor + draw.normal(scale=0.3, size=tensor.shape).astype(np.float32)
        save_file(tensors, file, metadata={"format": "pt"})
    return made


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """A function that copies an adapter and changes fields of its config."""

    def copy(name: str, fields: dict[str, Any]) -> Path:
        shutil.copytree(folder / name, tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return tmp_path / "adapter"

    return copy


@pytest.mark.parametrize("case", CASES)
def test_loading_and_inspect_go_by_the_config(
    case: str, folder: Path, changed: Callable[[str, dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, fields, named = CASES[case]
    adapter = changed(name, fields)
    base = pj.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert main(["inspect", str(adapter), "--model", str(folder / "base"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["fits"] is (named is None)
    if named is not None:
        with pytest.raises(ValueError, match="does not fit this base: .*with the config that was saved with it"):
            pj.PeftModel.from_pretrained(base, adapter)
        tree = pj.get_peft_model_state_dict(pj.PeftModel.from_pretrained(base, folder / name))
        shapes = {key: tensor.shape for key, tensor in tree.items()}
        reasons = pj.interop.tensors.misfits(base, pj.PeftConfig.from_pretrained(adapter), shapes)
        assert any(named in reason for reason in reasons), reasons
        assert any(named in reason for reason in found["problems"] + found["fit"]["reasons"]), found["fit"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter)
    with torch.no_grad():
        want = theirs(torch.tensor(IDS)).logits.numpy()
    got = np.asarray(pj.PeftModel.from_pretrained(base, adapter)(jnp.array(IDS)).logits)
    alone = np.asarray(base(jnp.array(IDS)).logits)
    got = got[:, -alone.shape[1] :]
    want = want[:, -alone.shape[1] :]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))
    assert np.abs(want - alone).max() > 1e-3


def test_a_bare_tree_goes_by_the_config_too() -> None:
    tree = {name: {"kernel": jnp.ones((4, 4))} for name in ("q", "v")}
    config = pj.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    tensors = pj.get_peft_model_state_dict(pj.apply_lora(tree, config))
    with pytest.raises(ValueError, match=r"v\.lora_A\.weight is left over \(the config does not ask for it\)"):
        pj.set_peft_model_state_dict(tree, config.replace(target_modules=["q"]), tensors)
    with pytest.raises(ValueError, match=r"x\.lora_A\.weight is left over \(this base has no such module\)"):
        moved = {key.replace(".v.", ".x."): tensor for key, tensor in tensors.items()}
        pj.set_peft_model_state_dict(tree, config.replace(target_modules=["q"]), moved)
    everything = pj.set_peft_model_state_dict(tree, config.replace(target_modules="all-linear"), tensors)
    assert sorted(pj.get_peft_model_state_dict(everything)) == sorted(tensors)
