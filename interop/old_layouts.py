"""Adapters of old layouts: the modules that their config and keys name were renamed in transformers since."""

from collections.abc import Mapping
from typing import Any, TypeVar

from peft_jax.interop.formats import PREFIX

from peft_jax.methods.base import Method

T = TypeVar("T")

LISTS = ("target_modules", "exclude_modules", "modules_to_save")
PATTERNS = ("rank_pattern", "alpha_pattern")


def with_present_names(
    config: Method, tensors: Mapping[str, T], moved: Mapping[str, str]
) -> tuple[Method, Mapping[str, T]]:
    """The config and the tensors of an adapter under the names that modules have today.

    PEFT 0.21 initializes such an adapter at random instead, with a warning, or does not find its targets.

    Args:
        config: The adapter's config.
        tensors: Tensors by key.
        moved: What paths of modules started with, and what they start with today.

    Returns:
        Both as they are, unless a key starts in an old way.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(target_modules=["query_key_value", "embed_out"])
        >>> key = "base_model.model.embed_out.lora_A.weight"
        >>> config, tensors = with_present_names(config, {key: 1}, {"embed_out.": "lm_head."})
        >>> list(config.target_modules), list(tensors)
        (['query_key_value', 'lm_head'], ['base_model.model.lm_head.lora_A.weight'])
    """
    starts = {PREFIX + old: PREFIX + new for old, new in moved.items()}
    present = {_restarted(key, starts): tensor for key, tensor in tensors.items()}
    if present.keys() == tensors.keys():
        return config, tensors
    changes: dict[str, Any] = {}
    for field in LISTS:
        names = getattr(config, field, None)
        if names and not isinstance(names, str):
            changes[field] = [_restarted(f"{name}.", moved).removesuffix(".") for name in names]
    for field in PATTERNS:
        patterns = getattr(config, field, None)
        if patterns:
            changes[field] = {_restarted(f"{name}.", moved).removesuffix("."): patterns[name] for name in patterns}
    return config.replace(**changes), present


def _restarted(path: str, starts: Mapping[str, str]) -> str:
    """A path with the first of the old starts that it has replaced."""
    for old, new in starts.items():
        if path.startswith(old):
            return new + path.removeprefix(old)
    return path
