"""Weights trained whole beside an adapter: PEFT's ``modules_to_save`` and ``bias``. A copy replaces the base."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method


@dataclasses.dataclass(frozen=True)
class Whole:
    """The part of a config that trains weights whole; ``role`` is ``"modules_to_save"`` or ``"bias"``.

    The trained copy is float32 and in matrix form, ``(*stack, in, out)`` or ``(*stack, out)``; only the layers in
    ``state["hit"]`` use theirs.
    """

    config: Method
    role: str
    side_path: ClassVar[bool] = False
    dropout_rate: ClassVar[float] = 0.0

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """A copy has the base's axes."""
        return {self.role: ("in", "out")}

    @property
    def label(self) -> str:
        """The role, as the method's name in tables."""
        return self.role

    def structure(self) -> tuple[Any, ...]:
        """What two adapters share if they run in the same compiled program."""
        return (Whole, self.role)

    def init(self, weight: Weight, hit: np.ndarray) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The copy, and which stacked layers it replaces."""
        copy = jnp.array(weight.layout.matrix(weight.dense()), jnp.float32, copy=True)
        return {self.role: copy}, {"hit": jnp.asarray(hit)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Number of trained elements of each stacked layer."""
        hit = np.asarray(state["hit"])
        (copy,) = params.values()
        return hit * np.prod(copy.shape[hit.ndim :], dtype=int)

    def apply(self, params: Arrays, state: Arrays, base: Weight, x: jax.Array, product: Product) -> jax.Array:
        """The product with the copy, or with the base where the layer is not hit."""
        return apply_merged(self, params, state, base, x, product)

    @staticmethod
    def merge(params: Arrays, state: Mapping[str, Any], matrix: jax.Array) -> jax.Array:
        """The copy where the layer is hit, else the base."""
        (copy,) = params.values()
        return jnp.where(state["hit"], copy.astype(matrix.dtype), matrix)
