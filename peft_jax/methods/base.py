"""What a method is: one frozen dataclass of hyperparameters with ``init`` and ``merge``, and the registry of them.

Config classes keep PEFT's class names, field names and defaults (PEFT 0.21.2).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.weight import Dot, Weight

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Fields that every PEFT config has; PEFT reads and writes them as ``adapter_config.json``.

    Attributes:
        task_type: What the adapter is for, e.g. ``"CAUSAL_LM"``; None if unsaid.
        base_model_name_or_path: Folder or hub id of the base model.
        revision: Revision of the base model on the hub.
        inference_mode: True to attach the adapter frozen.
        auto_mapping: Names of a custom base class, as PEFT stores them.
        peft_version: Version that wrote the config; ours when written here.
    """

    peft_type: ClassVar[str]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None

    def __hash__(self) -> int:
        return id(self)


class Method(PeftConfig):
    """A method that changes weights: how its arrays start, and what the adapted matrix is.

    Arrays live in two dictionaries, ``params`` (trained) and ``state`` (frozen), both with the stacked axes first.
    ``merge``, ``apply`` and ``take`` see one layer, without stacked axes; ``structural`` names the fields that
    change what they compute beyond what the arrays say.
    """

    structural: ClassVar[tuple[str, ...]] = ()
    side_path: ClassVar[bool] = True

    def structure(self) -> tuple[Any, ...]:
        """What two configs share exactly if their adapters run in the same compiled program."""
        return (type(self), *(getattr(self, name) for name in self.structural))

    def init(self, weight: Weight, names: np.ndarray, key: jax.Array) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Trainable and frozen arrays for a leaf that stands for the layers ``names``."""
        raise NotImplementedError

    @staticmethod
    def merge(params: Arrays, state: Arrays, matrix: jax.Array) -> jax.Array:
        """The adapted matrix, same shape and dtype as ``matrix``: ``(in, out)``, or ``(out,)`` for a vector."""
        raise NotImplementedError

    @classmethod
    def apply(cls, params: Arrays, state: Arrays, base: Weight, x: jax.Array, dot: Dot) -> jax.Array:
        """``x @ merge(...)`` for ``x`` of shape ``(..., in)``; override where it is cheaper than merging."""

        @jax.checkpoint
        def merged(params: Arrays, state: Arrays, base: Weight, x: jax.Array) -> jax.Array:
            matrix = cls.merge(params, state, base.layout.matrix(base.dense()))
            return jnp.matmul(x, matrix, **dot._asdict())

        return merged(params, state, base, x)

    @classmethod
    def take(cls, params: Arrays, state: Arrays, base: Weight, rows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """``rows(merge(...))``; override where it is cheaper than merging."""
        return rows(cls.merge(params, state, base.layout.matrix(base.dense())))


M = TypeVar("M", bound=type[PeftConfig])
_METHODS: dict[str, type[PeftConfig]] = {}


def register(peft_type: str) -> Callable[[M], M]:
    """Enter a config class under PEFT's name for it, so that files and commands find it."""

    def enter(cls: M) -> M:
        cls.peft_type = peft_type
        _METHODS[peft_type] = cls
        return cls

    return enter


def by_name(peft_type: str) -> type[PeftConfig]:
    """The config class that PEFT calls ``peft_type``.

    Raises:
        ValueError: if there is none.

    Example:
        >>> by_name("LORA").__name__
        'LoraConfig'
    """
    if peft_type not in _METHODS:
        raise ValueError(f"peft_type '{peft_type}' is not supported. Supported: {', '.join(names())}.")
    return _METHODS[peft_type]


def names() -> list[str]:
    """PEFT's names of all supported methods."""
    return sorted(_METHODS)
