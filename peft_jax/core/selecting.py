"""Parts of sequences and dictionaries."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


def picked(items: Sequence[V], places: Iterable[int]) -> tuple[V, ...]:
    """The items at some places, in the order of the places.

    Example:
        >>> picked((8, 4, 16), (2, 0))
        (16, 8)
    """
    return tuple(items[place] for place in places)


def only(mapping: Mapping[K, V], keys: Iterable[K]) -> dict[K, V]:
    """The entries of some keys, in the order of the keys.

    Raises:
        KeyError: If a key is not there.

    Example:
        >>> only({"r": 8, "alpha": 16}, ["alpha"])
        {'alpha': 16}
    """
    return {key: mapping[key] for key in keys}


def present(mapping: Mapping[K, V], keys: Iterable[K]) -> dict[K, V]:
    """The entries of those keys that are there, in the order of the keys.

    Example:
        >>> present({"r": 8, "alpha": 16}, ["alpha", "bias"])
        {'alpha': 16}
    """
    return {key: mapping[key] for key in keys if key in mapping}


def without(mapping: Mapping[K, V], keys: Collection[K]) -> dict[K, V]:
    """The entries of all other keys.

    Example:
        >>> without({"rank": 8, "dropout": 0.1}, ["dropout"])
        {'rank': 8}
    """
    return {key: value for key, value in mapping.items() if key not in keys}


def not_none(mapping: Mapping[K, V | None]) -> dict[K, V]:
    """The entries whose values are not None.

    Example:
        >>> not_none({"revision": None, "token": "x"})
        {'token': 'x'}
    """
    return {key: value for key, value in mapping.items() if value is not None}


def field_names(fields: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass, or of one of its instances.

    Example:
        >>> import peft_jax as pj
        >>> field_names(pj.EvaConfig)[:2]
        ('rho', 'tau')
    """
    return tuple(field.name for field in dataclasses.fields(fields))


def fields_of(record: Any, names: Iterable[str]) -> dict[str, Any]:
    """Values of some attributes of an object, by name.

    Example:
        >>> import peft_jax as pj
        >>> fields_of(pj.LoraConfig(r=2), ["r", "bias"])
        {'r': 2, 'bias': 'none'}
    """
    return {name: getattr(record, name) for name in names}
