"""Each field of transformers' configs that its model code reads changes our config too, or is refused."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cases import ARCHITECTURES

from peft_jax.models.registry import BY_MODEL_TYPE, read_architecture

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

DECODERS = [kind for row in ARCHITECTURES.values() if row.switches or row.conv1d for kind in row.model_types]
# What has no part in a forward pass, or none beside the default values of the other fields.
INERT = {
    **dict.fromkeys(("use_cache", "return_dict", "output_attentions", "output_hidden_states"), "what a call returns"),
    **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size"), "enable_moe_block, which is refused"),
    **dict.fromkeys(("summary_use_proj", "summary_proj_to_labels"), "GPT-2's head of multiple choices"),
    "dtype": "how weights are stored",
    "is_decoder": "a warning of GPT-NeoX",
    "use_sliding_window": "sliding_window, which is None",
}
DROPOUT = re.compile(r".*(dropout|pdrop|layerdrop)")  # of the base in training; bases are frozen and run without


def other_value(value: Any) -> Any:
    """Another value of a field; None where there is none that any field of the kind would take."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value + 2
    if isinstance(value, float):
        return 2 * value + 0.25
    if isinstance(value, str):
        return "gelu" if value == "relu" else "relu"
    return 3 if value is None else None


def fields_of(kind: str) -> Iterator[tuple[str, Any]]:
    """The fields that the model code of a model type reads, and another value of each."""
    config = transformers.AutoConfig.for_model(kind).get_text_config()
    model = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    code = inspect.getsource(sys.modules[model.__module__])
    for field, value in config.to_dict().items():
        is_read = re.search(rf"config\.{field}\b", code) is not None
        other = other_value(value)
        if is_read and other is not None and field not in INERT and not DROPOUT.match(field):
            yield field, other


@pytest.mark.parametrize("kind", DECODERS)
def test_no_field_is_ignored(kind: str) -> None:
    default = read_architecture({"model_type": kind})
    is_part = BY_MODEL_TYPE[kind].config.__name__.endswith("MultimodalConfig")
    found, ignored = 0, []
    for field, value in fields_of(kind):
        asked = {"text_config": {field: value}} if is_part else {field: value}
        found += 1
        try:
            changed = read_architecture({"model_type": kind, **asked})
        except Exception:  # transformers' own checks are of several classes
            continue
        is_taken = transformers.AutoConfig.for_model(kind, **asked).get_text_config().to_dict()[field] == value
        if changed == default and is_taken:  # transformers leaves out a window that it is told not to use
            ignored.append(f"{field}={value!r}")
    assert found > 3 and not ignored
