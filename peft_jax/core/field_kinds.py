"""Whether a value is of the kind that a field's annotation says."""

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def is_kind(value: Any, annotation: Any) -> bool:
    """Whether a value is what a config field's annotation says; whole numbers are floats, lists are sequences.

    Example:
        >>> is_kind(["q"], str | Sequence[str] | None), is_kind("8", int), is_kind(True, int)
        (True, False, False)
    """
    origin, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(is_kind(value, part) for part in parts)
    if origin is Any:
        return True
    if origin in (int, float):
        numbers = (int, np.integer) if origin is int else (int, float, np.integer, np.floating)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if origin is tuple and parts and parts[-1] is not Ellipsis:
        is_fitting = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(parts)
        return is_fitting and all(map(is_kind, value, parts))
    if origin in (list, tuple, Sequence):
        inner = parts[:1] or (Any,)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(is_kind(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        inner = parts[1:] or (Any,)
        return isinstance(value, Mapping) and all(is_kind(item, inner[0]) for item in value.values())
    return origin is None and value is None or isinstance(origin, type) and isinstance(value, origin)
