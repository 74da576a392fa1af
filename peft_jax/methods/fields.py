"""Fields of PEFT's configs: those that are refused away from their default, and what all methods check alike."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.strict_json import shown
from peft_jax.core.targets import check_expressions
from peft_jax.methods.task_type import TaskType


def unsupported(default: Any, switch: str = "") -> Any:
    """A field of PEFT's that is refused away from its default, unless it is off or its ``switch`` is, another field."""
    return dataclasses.field(
        default_factory=lambda: copy.copy(default), metadata={"default": default, "switch": switch}
    )


def is_off(value: Any) -> bool:
    """Whether a value of a field says nothing: it is false, null or empty, or holds nothing else.

    Example:
        >>> is_off({"ephemeral_gpu_offload": False}), is_off([]), is_off(16)
        (True, True, False)
    """
    if isinstance(value, Mapping):
        return all(map(is_off, value.values()))
    return value is None or (not value if isinstance(value, Sequence) else value == 0)


def check_fields(config: Any, peft_type: str) -> None:
    """Make lists and sets of a config tuples, and raise ValueError if a field that many methods have is wrong."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (list, set, frozenset)):
            ordered = value if isinstance(value, list) else sorted(value)
            object.__setattr__(config, field.name, tuple(ordered))
        if "default" not in field.metadata or value == field.metadata["default"]:
            continue
        is_on_when_empty = isinstance(value, Mapping) and field.metadata["default"] is None  # as PEFT asks for None
        if is_off(value) and not is_on_when_empty:
            continue
        if not field.metadata["switch"] or not is_off(getattr(config, field.metadata["switch"])):
            raise ValueError(
                f"{type(config).__name__}({field.name}={value!r}) is not supported yet. Leave it at its default."
            )
    if isinstance(config.modules_to_save, str):
        raise ValueError(f"modules_to_save is a list of names. Write [{config.modules_to_save!r}].")
    check_kinds(config)
    if config.task_type is not None and config.task_type not in list(TaskType):
        raise ValueError(f"task_type is one of {', '.join(TaskType)}, or None, got {config.task_type!r}.")
    only = config.bias_only or f"{peft_type.lower()}_only"
    if config.bias not in ("none", "all", only):
        raise ValueError(f"bias is 'none', 'all' or '{only}', got {config.bias!r}.")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise ValueError("layers_to_transform goes with a list of target_modules. Put the layers into the regex.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers_to_transform counts. Give layers_to_transform too.")
    tokens = config.trainable_token_indices
    for name, ids in (tokens if isinstance(tokens, Mapping) else {"": tokens} if tokens is not None else {}).items():
        check_tokens(ids, f"trainable_token_indices{f' of {name!r}' if name else ''}")
    check_expressions(config, config.patterns)


def check_kinds(options: Any) -> None:
    """Raise ValueError if a field of a dataclass has a value of another kind than it says, or a number without bounds.

    Numbers are finite, and whole ones fit into 64 bits.
    """
    for field in dataclasses.fields(options):
        if not _is_bounded(getattr(options, field.name)):
            found = shown(getattr(options, field.name))
            raise ValueError(
                f"{type(options).__name__} has {field.name}={found}. Write finite numbers of at most 64 bits."
            )
        if not is_kind(value := getattr(options, field.name), field.type):
            kind = inspect.formatannotation(field.type).replace("collections.abc.", "").replace("typing.", "")
            raise ValueError(f"{type(options).__name__} has {field.name}={shown(value)}. Give it a value of: {kind}.")


def _is_bounded(value: Any) -> bool:
    """Whether a number is, or all those in a value are, finite and of at most 64 bits."""
    if isinstance(value, Mapping):
        return all(map(_is_bounded, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_bounded, value))
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**64


def check_rank(config: Any) -> None:
    """Raise ValueError unless ``r`` and the ranks of ``rank_pattern`` are at least 1."""
    ranks = {"r": config.r, **config.rank_pattern}
    if wrong := {name: rank for name, rank in ranks.items() if not isinstance(rank, int) or rank < 1}:
        raise ValueError(f"{config.peft_type} needs ranks of at least 1, got {wrong}.")


def check_probability(config: Any, field: str) -> None:
    """Raise ValueError unless a field is a probability below 1."""
    if not 0 <= (value := getattr(config, field)) < 1:
        raise ValueError(f"{field} is a probability in [0, 1), got {value}.")


def check_tokens(tokens: Sequence[int], field: str) -> None:
    """Raise ValueError unless ``tokens`` are ids, at least one and none of them twice."""
    if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(
            f"{field} names the ids of the tokens to train, at least one and none below 0, got {tokens!r}."
        )
    if twice := sorted({token for token in tokens if list(tokens).count(token) > 1}):
        raise ValueError(f"{field} names {twice} more than once. Name each token once.")


def kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """As PyTorch starts a Linear: ``kaiming_uniform_`` with a = sqrt(5), which is uniform within 1 / sqrt(fan_in)."""
    return jax.random.uniform(key, shape, minval=-1.0) / fan_in**0.5
