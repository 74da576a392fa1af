"""Base class of methods whose fresh arrays depend on the weight that they go on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.weight import Weight


class Neighbours(NamedTuple):
    """Weights without adapters that a module's arrays may depend on beside its own matrix.

    Attributes:
        bias: The biases ``(*stack, out)`` that change with the matrix, if there are some.
        matrices: The matrices ``(in, out)`` of all modules of the adapter by name, in the order in which PyTorch
            declares them.
        sizes: ``(in, out)`` of each of them, in that order.
        kept: What a method keeps from one leaf of the adapter to the next.
    """

    bias: jax.Array | None
    matrices: Mapping[str, jax.Array]
    sizes: Mapping[str, tuple[int, int]]
    kept: dict[str, Any]


class StartsFromWeight:
    """A method that looks at the base's numbers to initialize its arrays, or takes a part out of the base."""

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """Trained and frozen arrays as from `Method.init`, and the base that they go on."""
        raise NotImplementedError

    def rebased(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
        """The base that `init_on` gave, made again for an adapter that is read from a file."""
        return base

    def state_on(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The frozen arrays that no file has: `init_on` makes them of the base, and reading a file makes them again."""
        return {}


class StartsAmongWeights(StartsFromWeight):
    """A method that looks at other weights too: its arrays come from `init_among` in place of `init` and `init_on`."""

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The state alone."""
        return {}, self.state(names, adapted)  # type: ignore[attr-defined]  # of the method

    def init_among(
        self, base: Weight, among: Neighbours, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init_on`, given other weights."""
        raise NotImplementedError

    def state_among(self, base: Weight, among: Neighbours, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """`state_on`, given other weights."""
        return self.state_on(base, names, adapted)
