"""Which tensor of a checkpoint is which leaf of a model for this or another task: prefixes, ties, fresh heads."""

import re
from collections.abc import Mapping, Sequence

from peft_jax.interop.checkpoint import Row
from peft_jax.interop.files import LazyArray
from peft_jax.models.config import FEATURE_EXTRACTION, ModelConfig
from peft_jax.models.family import LANGUAGE_MODELS, Family

Tensors = Mapping[str, LazyArray]


def fit_keys(family: Family, config: ModelConfig, tensors: Tensors) -> dict[str, LazyArray]:
    """Tensors under the keys that this model has for them, whether the checkpoint is of a bare model or has a head.

    Example:
        >>> import numpy as np
        >>> from peft_jax.models.registry import GPT2
        >>> from peft_jax.models.gpt2.config import GPT2Config
        >>> list(fit_keys(GPT2, GPT2Config(), {"wte.weight": np.zeros((2, 2))}))
        ['transformer.wte.weight']
    """
    found = {_new_name(family, key): tensor for key, tensor in tensors.items()}
    backbone = family.backbone_of(config)
    prefix = f"{backbone}." if backbone else ""
    if backbone != family.backbone:  # the checkpoint may be that of another task
        found = {_restarted(key, f"{family.backbone}.", prefix): tensor for key, tensor in found.items()}
    has_prefix = any(key.startswith(prefix) for key in found)
    if config.task_type == FEATURE_EXTRACTION:
        return {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix) or not has_prefix}
    if has_prefix:
        return found
    return {key if _is_head(family, key) else prefix + key: tensor for key, tensor in found.items()}


def fresh_rows(family: Family, config: ModelConfig, rows: Sequence[Row], tensors: Tensors) -> list[Row]:
    """The leaves that a checkpoint of another task has no tensor for, and that start at random instead.

    They are those of heads and poolers; a language model's head is never one of them.
    """
    if config.task_type in LANGUAGE_MODELS:
        return []
    mine = [row for row in rows if _is_head(family, row.path) or _is_extra(family, row.path)]
    return [row for row in mine if tensors.keys().isdisjoint(row.keys)]


def unused(family: Family) -> list[str]:
    """Regexes of tensors that may be left over: buffers, and what other tasks have."""
    heads = [rf"{re.escape(name)}\..*" for name in _head_names(family)]
    return [*family.ignored, *family.surplus, *heads, *family.extras]


def _new_name(family: Family, key: str) -> str:
    for old, new in family.moved.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    for old, new in family.renamed.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _restarted(key: str, start: str, new: str) -> str:
    return new + key.removeprefix(start) if key.startswith(start) else key


def _head_names(family: Family) -> set[str]:
    return {name.split(".")[0] for name in family.heads.values()}


def _is_head(family: Family, path: str) -> bool:
    return path.split(".")[0] in _head_names(family)


def _is_extra(family: Family, path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in family.extras)
