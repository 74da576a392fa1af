"""Base class of methods whose files have arrays of a layer that are not trained."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.selecting import present, without
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method


def check_indices(name: str, indices: np.ndarray, size: int, path: str) -> None:
    """Raise ValueError unless an array of a file has whole numbers from 0 to ``size - 1``.

    Example:
        >>> check_indices("places", np.array([0, 5]), 6, "q.kernel")
    """
    is_index = (indices >= 0) & (indices < size) & (indices == np.floor(indices))
    if not is_index.all():
        wrong = indices[~is_index].ravel()[0]
        raise ValueError(
            f"{name} of '{path}' holds {wrong}, which is no whole number from 0 to {size - 1}. "
            "Take an undamaged copy of the adapter."
        )


class FrozenArrays(Method):
    """A method some of whose roles are frozen: a file has them like the others, and in a tree they are in the state."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Those of the roles in ``axes`` that are not trained."""
        raise NotImplementedError

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As every method's, with the frozen arrays in the state."""
        params, state = super().init(layout, shape, names, adapted, key)
        trained, frozen = self.apart(params)
        return trained, state | frozen

    def apart(self, arrays: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The arrays of a file as those that are trained and those that are not."""
        return without(arrays, self.frozen), present(arrays, self.frozen)

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if arrays of a file cannot be those of the matrix ``(n_in, n_out)`` of a leaf.

        Beside them are those of the leaf's state that the base gives.
        """

    def derived(self, frozen: Mapping[str, Any], base: Weight, adapted: np.ndarray) -> dict[str, jax.Array]:
        """More frozen arrays of a leaf, which the base and those of a file give."""
        return {}

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The trained arrays and the frozen ones."""
        return {**params, **present(state, self.frozen)}
