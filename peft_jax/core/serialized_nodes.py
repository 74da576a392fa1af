"""Nodes of trees, for ``jax.export`` to write their structure, and for ``flax.serialization`` their arrays.

The static fields of a node go into an exported program as JSON. Reading it makes dataclasses of this package and plain
values, nothing else.
"""

import dataclasses
import enum
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import export

from peft_jax.core.selecting import field_names
from peft_jax.core.strict_json import parse_json

PACKAGE = "peft_jax."
Node = TypeVar("Node")
KIND = "kind"  # the key of a JSON object that says what it is


def register_node(cls: type[Node], data_fields: Sequence[str], meta_fields: Sequence[str]) -> type[Node]:
    """``jax.tree_util.register_dataclass`` of a leaf that trees keep, or of a handle, with JAX's export and Flax too.

    Args:
        cls: The dataclass.
        data_fields: Names of its fields that hold arrays.
        meta_fields: Names of the others.
    """

    def to_state(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in data_fields}

    def from_state(node: Any, state: Mapping[str, Any]) -> Any:
        changes = {}
        for name in data_fields:
            changes[name] = serialization.from_state_dict(getattr(node, name), state[name], name)
        return dataclasses.replace(node, **changes)

    jax.tree_util.register_dataclass(cls, data_fields, meta_fields)
    serialization.register_serialization_state(cls, to_state, from_state)
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__}.{cls.__qualname__}",
        serialize_auxdata=lambda fields: json.dumps(_plain(fields)).encode(),
        deserialize_auxdata=lambda data: _value(parse_json(bytes(data).decode())),
    )
    return cls


def register_output(cls: type[Node]) -> type[Node]:
    """A named tuple that functions return, with JAX's export."""
    export.register_namedtuple_serialization(cls, serialized_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


def _plain(value: Any) -> Any:
    """A value of a static field as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    kind = type(value)
    is_own = kind.__module__.startswith(PACKAGE)
    if isinstance(value, (tuple, frozenset, set)) and kind in (tuple, frozenset, set):
        return {KIND: kind.__name__, "of": [_plain(one) for one in value]}
    if isinstance(value, Mapping):
        return {KIND: "dict", "of": [[_plain(key), _plain(one)] for key, one in value.items()]}
    if isinstance(value, np.dtype) or value in (jnp.bfloat16, jnp.float32, jnp.float16):
        return {KIND: "dtype", "of": jnp.dtype(value).name}
    name = f"{kind.__module__}:{kind.__qualname__}"
    if is_own and isinstance(value, enum.Enum):
        return {KIND: name, "of": value.name}
    names = _field_names(kind)
    if is_own and names is not None:
        return {KIND: name, "of": {field: _plain(getattr(value, field)) for field in names}}
    raise TypeError(
        f"An exported program cannot hold {value!r}, of type {kind.__name__}, in a static field of a leaf or handle. "
        "Export a function of the merged tree: pj.merge(params)."
    )


def _value(plain: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(plain, list):
        return [_value(one) for one in plain]
    if not isinstance(plain, dict):
        return plain
    kind, inner = plain[KIND], plain["of"]
    if kind in ("tuple", "frozenset", "set"):
        return {"tuple": tuple, "frozenset": frozenset, "set": set}[kind](map(_value, inner))
    if kind == "dict":
        return {_value(key): _value(one) for key, one in inner}
    if kind == "dtype":
        return jnp.dtype(inner)
    module, _, name = kind.partition(":")
    cls = getattr(importlib.import_module(module), name, None) if module.startswith(PACKAGE) else None
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        return cls[inner]
    names = _field_names(cls)
    if not isinstance(cls, type) or names is None or not set(names) <= set(inner):
        raise ValueError(f"An exported program names {kind!r}, which is no dataclass of peft_jax now. Export it again.")
    fields = {name: _value(inner[name]) for name in names}
    if issubclass(cls, tuple):
        return cls(**fields)
    made = object.__new__(cls)  # as it was: its checks were done when it was made
    for field, one in fields.items():
        object.__setattr__(made, field, one)
    return made


def _field_names(cls: Any) -> Sequence[str] | None:
    """Names of the fields of a dataclass or of a named tuple; None of another class."""
    if dataclasses.is_dataclass(cls):
        return field_names(cls)
    names: Sequence[str] | None = getattr(cls, "_fields", None)
    return names
