"""Leaves beside a method's own: weights trained whole, and biases that change with their layer's matrix."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import LAYER, apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method

REPLACED = "ln_tuning_layers"  # the role of a copy that is the method itself, as LN_TUNING's


@dataclasses.dataclass(frozen=True)
class Part:
    """What a config does to a leaf that is not the matrix of a target; ``role`` says which."""

    config: Method
    role: str
    side_path: ClassVar[bool] = False
    dropout_rates: ClassVar[Mapping[str, float]] = MappingProxyType({})

    @property
    def label(self) -> str:
        """The role, as the method's name in tables."""
        return self.role

    def apply(self, params: Arrays, state: Arrays, base: Weight, x: jax.Array, product: Product) -> jax.Array:
        """The product with the merged matrix."""
        return apply_merged(self, params, state, base, x, product)


class Whole(Part):
    """A weight trained whole, PEFT's ``modules_to_save`` and ``bias``; its role is the one or the other.

    The trained copy is float32 and in matrix form, ``(*stack, in, out)`` or ``(*stack, out)``; only the layers in
    ``state["hit"]`` use theirs.
    """

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """A copy has the base's axes."""
        return {self.role: ("in", "out")}

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

    @staticmethod
    def merge(params: Arrays, state: Mapping[str, Any], matrix: jax.Array) -> jax.Array:
        """The copy where the layer is hit, else the base."""
        (copy,) = params.values()
        return jnp.where(state["hit"], copy.astype(matrix.dtype), matrix)


class Follower(Part):
    """A bias that the adapter of its layer's matrix changes too, with the same arrays.

    They are trained, counted and saved with the matrix; the bias has them as ``state["layer"]``
    (`peft_jax.core.adapted.tied` hands them over).
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def structure(self) -> tuple[Any, ...]:
        """That of the method."""
        return (Follower, *self.config.structure())

    def init(self, names: np.ndarray, hit: np.ndarray) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Nothing to train, and the method's state."""
        return {}, {**self.config.state(names, hit), LAYER: {}}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """None."""
        return np.zeros((), int)

    def merge(self, params: Arrays, state: Mapping[str, Any], bias: jax.Array) -> jax.Array:
        """As the method changes a bias."""
        own = {name: array for name, array in state.items() if name != LAYER}
        return self.config.merge_bias(state[LAYER], own, bias)


def config_of(tagged: Any) -> Method:
    """The whole config of what a leaf is tagged with."""
    config: Method = tagged.config if isinstance(tagged, Part) else tagged
    return config
