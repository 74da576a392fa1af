"""Tiny mixtures of experts of transformers, which several tests compare ours with."""

from typing import Any

import pytest
from cases import ARCHITECTURES

ROWS = {
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "qwen2_moe": "qwen3_moe",
    "olmoe": "olmoe",
    "gpt_oss": "gpt_oss",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v2": "deepseek_v3",
}
ROUTERS = {"gpt_oss": "router"}  # those that are not called "gate"
# A dense layer among the others; limits that are reached.
FIELDS = {"qwen3_moe": {"mlp_only_layers": [1]}, "gpt_oss": {"swiglu_limit": 0.5}}


def torch_model(kind: str, **fields: Any) -> Any:
    """A causal language model with random weights; ``fields`` are further ones of its config."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    row = ARCHITECTURES[ROWS[kind]]
    torch.manual_seed(0)
    fields = {**row.sizes, **row.model_types[kind], **FIELDS.get(kind, {}), **fields}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields))
    return moved(model.float().eval(), 0.15, list(model.parameters()))


def moved(model: Any, noise: float, parameters: Any) -> Any:
    """The model, whose parameters have noise added to them."""
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(noise * torch.randn_like(parameter))
    return model
