"""Models under the module names of an adapter's keys: those of a text model, or of the multimodal model around it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft_jax.core.pytree import PyTree
from peft_jax.interop.formats import PREFIX
from peft_jax.models.config import ModelConfig, as_class
from peft_jax.models.family import leaf_at, with_leaf
from peft_jax.models.registry import BY_MODEL_TYPE, family_of


def config_for(config: ModelConfig, keys: Iterable[str]) -> ModelConfig:
    """The config of the same model whose modules have the names that an adapter's keys have.

    Args:
        config: The architecture.
        keys: The keys of the adapter's file.

    Returns:
        The config itself, unless all keys below a backbone are below that of the other model.

    Example:
        >>> from peft_jax.models.registry import read_architecture
        >>> config = read_architecture({"model_type": "qwen3_5_text"})
        >>> key = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight"
        >>> config_for(config, [key]).model_type
        'qwen3_5'
    """
    family = family_of(config)
    other_type = family.beside.get(config.model_type)
    if other_type is None:
        return config
    other = BY_MODEL_TYPE[other_type]
    if config.task_type not in other.config.tasks:
        return config
    longest_first = sorted((family.backbone, other.backbone), key=len, reverse=True)
    found = set[str]()
    for key in keys:
        for backbone in longest_first:
            if key.startswith(f"{PREFIX}{backbone}."):
                found.add(backbone)
                break
    if found != {other.backbone}:
        return config
    return as_class(config, other.config, model_type=other_type)


def params_for(config: ModelConfig, params: PyTree, wanted: ModelConfig) -> Any:
    """Parameters of a config under the names of the config that `config_for` made of it."""
    old, new = family_of(config).backbone, family_of(wanted).backbone
    if old == new:
        return params
    top, *_ = old.split(".")
    rest = {name: leaf for name, leaf in params.items() if name != top}
    return with_leaf(rest, new, leaf_at(params, old))
