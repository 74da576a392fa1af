"""The text parts of multimodal checkpoints against PyTorch: numbers, adapters under their keys, text checkpoints."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from cases import ARCHITECTURES
from conformance import close, same_files, tolerance
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.defaults import method_defaults

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.random.default_rng(0).integers(3, 50, (2, 8))
MASK = np.ones_like(IDS)
MASK[1, :3] = 0
FILES = ("adapter_model.safetensors", "adapter_config.json")
OLD = ".language_model.model."
LAST = ["q_proj", "down_proj"]
TARGETS = r".*language_model\..*\.(q_proj|down_proj)"
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {
    "gemma3": {"vision_config": {**SMALL, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma4": {
        "vision_config": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
        "audio_config": None,
    },
    "qwen3_5": {
        "vision_config": {
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
            **{"patch_size": 4, "num_position_embeddings": 16},
        }
    },
}


@pytest.fixture(scope="module", params=VISION)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A multimodal PyTorch model, and its checkpoint."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, **ARCHITECTURES[request.param].sizes, **VISION[request.param]
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), use_cache=False).logits.numpy()


def test_the_text_part_and_its_adapters(pair: Any, tmp_path: Any) -> None:
    theirs, folder = pair
    ours = pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    plain = torch_logits(theirs)
    close(ours(IDS, MASK).logits, plain)
    ours.save_pretrained(tmp_path / "text")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert text.config.model_type == f"{theirs.config.model_type}_text"
    close(torch_logits(text), plain)
    tied = {"lm_head.weight"} if theirs.config.get_text_config().tie_word_embeddings else set()
    assert text.state_dict().keys() - tied == load_file(tmp_path / "text" / "model.safetensors").keys()
    text_base = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype="float32")
    cases = [("whole", theirs, TARGETS, "model.language_model.layers."), ("text", text, LAST, "model.model.layers.")]
    for name, base, targets, part in cases:
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type=CAUSAL_LM))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        adapted.eval().save_pretrained(tmp_path / name / "theirs")
        want = torch_logits(adapted)
        assert np.abs(want - plain).max() > 100 * tolerance(want)
        for ours_on in (ours, text_base):  # whichever names the base has, the adapter's keys decide
            model = pj.PeftModel.from_pretrained(ours_on, tmp_path / name / "theirs")
            close(model(IDS, MASK).logits, want)
            model.save_pretrained(tmp_path / name / "ours")
            assert part in " ".join(same_files(tmp_path / name / "ours", tmp_path / name / "theirs"))
        if theirs.config.model_type == "gemma3" and name == "whole":  # the keys of transformers before 4.52
            tensors = load_file(tmp_path / name / "theirs" / FILES[0])
            old = {key.replace(".model.language_model.", OLD): tensor for key, tensor in tensors.items()}
            assert all(OLD in key for key in old)
            save_file(old, tmp_path / name / "theirs" / FILES[0])
            model = pj.PeftModel.from_pretrained(ours, tmp_path / name / "theirs")
            close(model(IDS, MASK).logits, want)
        merged = tmp_path / name / "merged"
        model.merge_and_unload().save_pretrained(merged)
        close(torch_logits(transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()), want)
        adapted.unload()


@pytest.mark.parametrize("method", ["Lora", "IA3", "LNTuning", "OFT", "Beft"])
@pytest.mark.parametrize("kind", VISION)
def test_default_targets_are_those_of_pefts_tables(kind: str, method: str) -> None:
    from peft.utils import constants

    peft_type = getattr(peft, f"{method}Config")().peft_type.value
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{peft_type.replace('LN_', 'LN')}_TARGET_MODULES_MAPPING")
    assert method_defaults(peft_type, kind).get("target_modules") == table.get(kind)


@pytest.mark.parametrize("kind, old", [("gpt_neox", ("embed_out.", "lm_head."))])
def test_an_adapter_of_an_old_layout(kind: str, old: tuple[str, str], tmp_path: Any) -> None:
    """PEFT 0.21 does not read them itself: what it computes under the present names is what they meant."""
    before, now = (name.removesuffix(".") for name in old)
    torch.manual_seed(0)
    sizes = ARCHITECTURES[kind].sizes
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    base = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    first = ARCHITECTURES[kind].modules.first
    adapters = {
        "LoraConfig": {"target_modules": [first, now], "rank_pattern": {now: 3}, "init_lora_weights": False},
        "IA3Config": {"target_modules": [first], "feedforward_modules": [], "modules_to_save": [now]},
    }
    for method, options in adapters.items():
        adapted = peft.get_peft_model(theirs, getattr(peft, method)(**options, task_type=CAUSAL_LM)).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        want = torch_logits(adapted)
        adapted.save_pretrained(tmp_path / method)
        theirs = adapted.unload()
        shutil.copytree(tmp_path / method, tmp_path / "old" / method)
        weights, config = (tmp_path / "old" / method / name for name in FILES)
        tensors = load_file(weights)
        renamed = {key.replace(f".{now}.", f".{before}."): tensor for key, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, weights)
        config.write_text(config.read_text().replace(f'"{now}"', f'"{before}"'))
        model = pj.PeftModel.from_pretrained(base, tmp_path / "old" / method)
        close(model(IDS, MASK).logits, want)
        model.save_pretrained(tmp_path / "ours" / method)
        same_files(tmp_path / "ours" / method, tmp_path / method)
