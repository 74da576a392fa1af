"""The kind and the range of every field of a model's config, checked before anything is computed from it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from typing import Any

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.strict_json import shown

# The smallest and the largest number that a field may have, by a regex of its names, ours and transformers'.
RANGES: tuple[tuple[str, float, float], ...] = (
    (r"num_(hidden_|decoder_)?layers|n_layers?", 1, 10_000),
    (r"num_kv_shared_layers", 0, 10_000),
    (r"num_(attention|key_value|global_key_value)?_?heads|n_heads?|num_kv_heads", 1, 100_000),
    (r"vocab_size|hidden_size|intermediate_size|head_dim|n_embd|d_model|d_kv|d_ff", 1, 10**8),
    (r".*_(size|dim)|n_inner", 0, 10**8),
    (r"(original_)?max_position_embeddings|n_positions", 1, 2**31 - 1),
    (r"num_labels", 1, 10**6),
    (r".*_(eps|epsilon)|initializer_(range|factor)|.*_(p)?drop(out)?", 0, 1e6),
    (r"rope_theta|(rope_)?factor|low_freq_factor|high_freq_factor", 1e-6, 1e30),
    (r"(short|long)_factor", 1e-6, 1e30),
)
LARGEST = 2**31 - 1  # of any other whole number
EXPANDED = ("num_hidden_layers", "num_decoder_layers", "num_layers", "n_layer", "n_layers", "num_labels")


def check_fields_of(config: Any) -> None:
    """Raise ValueError unless each field of a dataclass is of the kind that it says and in its range.

    Heads whose size is not given have to divide the width.

    Args:
        config: A model's config, or a part of one.

    Example:
        >>> check_range("num_hidden_layers", 10**9, "n_layer")
        Traceback (most recent call last):
        ...
        ValueError: n_layer=1000000000 is not supported. Write a number from 1 to 10000.
    """
    spelled: Mapping[str, str] = getattr(config, "spelled", {})
    cls: Any = type(config)
    kinds = _kinds(cls)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), spelled.get(field.name, field.name)
        if not is_kind(value, kinds[field.name]) and not dataclasses.is_dataclass(value):
            raise ValueError(f"{name}={shown(value)} is not supported. Write a value of: {_words(kinds[field.name])}.")
        check_range(field.name, value, name)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if width is None or heads is None or getattr(config, "head_dim", None) is not None:
        return
    if width % heads:
        width_name = spelled.get("hidden_size", "hidden_size")
        heads_name = spelled.get("num_attention_heads", "num_attention_heads")
        raise ValueError(f"{width_name}={width} is not a multiple of {heads_name}={heads}, which it must be.")


def check_raw(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for entries of a config.json that transformers would expand, or stumble over.

    Args:
        raw: The entries.

    Example:
        >>> check_raw({"n_layer": 10**9})
        Traceback (most recent call last):
        ...
        ValueError: n_layer=1000000000 is not supported. Write a number from 1 to 10000.
    """
    for name in EXPANDED:
        value = raw.get(name)
        if value is not None and not is_kind(value, int):
            raise ValueError(f"{name}={shown(value)} is not supported. Write a whole number.")
        check_range(name, value, name)
    for name, kind in {"architectures": list[str], "id2label": dict, "label2id": dict}.items():
        value = raw.get(name)
        if value is not None and not is_kind(value, kind):
            raise ValueError(f"{name}={shown(value)} is not supported. Write a value of: {_words(kind)}.")


def check_range(field: str, value: Any, name: str) -> None:
    """Raise ValueError if a number, or one of a sequence, is not finite or outside the range of its field.

    Args:
        field: The field.
        value: Its value; what is no number is passed over.
        name: What errors call the field.
    """
    numbers = value if isinstance(value, list | tuple) else (value,)
    for number in numbers:
        if not is_kind(number, int | float):
            continue
        least, most = _range(field)
        if not math.isfinite(number) or not least <= number <= most:
            raise ValueError(
                f"{name}={shown(number)} is not supported. Write a number from {least:.15g} to {most:.15g}."
            )


@functools.lru_cache(maxsize=512)
def _range(field: str) -> tuple[float, float]:
    for pattern, least, most in RANGES:
        if re.fullmatch(pattern, field):
            return least, most
    return -LARGEST, LARGEST


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _words(kind: Any) -> str:
    return str(kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else kind).replace("typing.", "")
