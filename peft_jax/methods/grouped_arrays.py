"""Base class of methods with trained arrays that groups of layers share: those of LILY."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from peft_jax.core.adapted import ADAPTER, Places
from peft_jax.methods.base import Arrays, Method


class GroupedArrays(Method):
    """A method whose ``carried`` arrays are trained once for each group of layers.

    A group's first layer has them in its ``params``, and all layers of the group have them in their state
    (`peft_jax.core.adapted_tree.tied` hands them over), so that gradients of the group add up. A file has them once
    more for each layer.
    """

    counts_modules: ClassVar[bool] = True

    def leaders(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
        """By role, the module whose array each module uses.

        Args:
            sizes: Sizes of the matrices of all modules by name, in the order in which PyTorch declares them.
        """
        raise NotImplementedError

    @staticmethod
    def leads(role: str) -> str:
        """The name in the state of which layers train an array of their own."""
        return f"leads.{role}"

    def places(self, sizes: Mapping[str, tuple[int, int]], names: np.ndarray, adapted: np.ndarray) -> Places:
        """Where the arrays of a leaf's layers are."""
        numbers = {name: number for number, name in enumerate(sizes)}
        hits = [str(name) if hit else "" for name, hit in zip(names.flat, adapted.flat, strict=True)]
        own = tuple(numbers.get(name, -1) for name in hits)
        found = []
        for role, of_module in self.leaders(sizes).items():
            found.append((role, tuple(numbers[of_module[name]] if name else -1 for name in hits)))
        return Places(own, tuple(found))

    @staticmethod
    def of_layer(params: Arrays, state: Mapping[str, Any], role: str) -> jax.Array:
        """One of the arrays, as a layer computes with it."""
        shared = state[ADAPTER]
        return shared[role] if role in shared else params[role]

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The arrays of each layer."""
        return {**params, **state[ADAPTER]}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Number of trained elements of each stacked layer; those of a group are its first layer's."""
        adapted = np.asarray(state["hit"])
        sizes = np.zeros(adapted.shape, int)
        for role, array in params.items():
            sizes = sizes + np.asarray(state.get(f"leads.{role}", adapted)) * int(np.prod(array.shape[adapted.ndim :]))
        return sizes
