"""Every field of a model's config has a kind and a range, checked before anything is computed from it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from cases import ARCHITECTURES

import peft_jax as pj
from peft_jax.models import GPT2Config, LlamaConfig
from peft_jax.models.registry import read_architecture
from peft_jax.prompts.tokenizer import read_tokenizer

# Changes to a config.json of a Llama, and the words of the error.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "heads that do not divide": ({"num_attention_heads": 3, "hidden_size": 64, "head_dim": None}, "multiple"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads|divi"),
    "no activation": ({"hidden_act": None}, "hidden_act"),
    "a list of activations": ({"hidden_act": ["silu"]}, "hidden_act"),
    "a rope without factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    "an odd rope": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "low_freq_factor"),
    "many layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 .* from 1 to 10000\."),
    "layers below 0": ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    "a text of layers": ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
    "many labels": ({"num_labels": 10**9}, "num_labels=1000000000"),
    "a theta of 0": ({"rope_theta": 0}, "rope_theta=0"),
    "an eps that is text": ({"rms_norm_eps": "a"}, "rms_norm_eps"),
    "classes that are numbers": ({"architectures": [3]}, r"architectures=\[3\]"),
    "a long text": ({"hidden_act": "x" * 10**6}, "hidden_act"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_outside_its_ranges_is_refused_in_one_line(case: str) -> None:
    changes, said = WRONG[case]
    begin = time.process_time()
    with pytest.raises(ValueError, match=said) as error:
        read_architecture({"model_type": "llama", **ARCHITECTURES["llama"].sizes, **changes})
    assert len(str(error.value)) < 1500 and len(str(error.value).splitlines()) == 1
    assert time.process_time() - begin < 20


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config])
def test_configs_made_in_python_have_the_same_ranges(kind: type) -> None:
    for changes in ({"num_hidden_layers": 10**9}, {"vocab_size": 0}, {"hidden_size": 1.5}, {"num_attention_heads": 0}):
        with pytest.raises(ValueError, match="is not supported"):
            kind(**changes)


def test_numbers_of_adapters_are_finite() -> None:
    for changes in ({"lora_alpha": float("inf")}, {"lora_alpha": float("nan")}, {"alpha_pattern": {"q": float("inf")}}):
        with pytest.raises(ValueError, match="Write finite numbers"):
            pj.LoraConfig(target_modules=["q"], **changes)
    with pytest.raises(ValueError, match="ranks of at least 1"):
        pj.LoraConfig(target_modules=["q"], r=0)
    with pytest.raises(ValueError, match="temperature"):
        pj.models.generation.generate_options.GenerateOptions(temperature=float("nan"))


def test_an_empty_object_switches_on_what_null_leaves_off() -> None:
    with pytest.raises(ValueError, match="arrow_config={}.* is not supported"):
        pj.LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "arrow_config": {}})
    config = pj.LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "kasa_config": {}})
    assert config.kasa_config == {"beta": 1e-4, "gamma": 1e-3}
    with pytest.raises(ValueError, match="use_cayley_neumann=None"):
        pj.OFTConfig.from_dict({"peft_type": "OFT", "target_modules": ["q"], "use_cayley_neumann": None})


def test_the_tokenizer_does_not_expand_what_a_config_says(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("num_labels", "num_hidden_layers"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", name: 10**30}))
        with pytest.raises(ValueError, match=f"its config.json: {name}=1000000"):
            read_tokenizer(tmp_path)
