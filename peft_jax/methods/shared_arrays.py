"""Base classes of methods with arrays that all layers share: VeRA's frozen matrices, VB-LoRA's trained vectors."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import ADAPTER
from peft_jax.methods.base import Arrays


class SharedArrays:
    """The part of a method that is one set of frozen arrays for all layers; a leaf has its part of them in its state.

    `peft_jax.adapters.build` hands the parts out, and a file has the whole arrays once (`SHARED` of the formats).

    Attributes:
        shared_axes: Their axes, by role.
    """

    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays, given the sizes of the matrices of all layers."""
        raise NotImplementedError

    def shared(self, sizes: Sequence[tuple[int, int]]) -> dict[str, jax.Array]:
        """The arrays of a fresh adapter, float32."""
        raise NotImplementedError

    @property
    def saves_shared(self) -> bool:
        """Whether a file has them; if not, they are made again as those of a fresh adapter."""
        return True

    def share(self, shared: Mapping[str, Any], sizes: tuple[int, int], stack: tuple[int, ...]) -> dict[str, jax.Array]:
        """A leaf's part of them, stacked axes first."""
        raise NotImplementedError

    def numbered(
        self, sizes: Mapping[str, tuple[int, int]], names: np.ndarray, adapted: np.ndarray, *, lookup: bool
    ) -> dict[str, jax.Array]:
        """More frozen arrays of a leaf, where these depend on the number of its modules among those of the adapter.

        Args:
            sizes: Sizes of the matrices of all modules by name, in the order in which PyTorch declares them.
            names: The leaf's modules.
            adapted: Which of them have the adapter.
            lookup: Whether they are embeddings.
        """
        return {}


class TrainedSharedArrays(SharedArrays):
    """The part of a method that is one set of trained arrays for all layers.

    The first leaf of an adapter trains them: they are in its ``params``, and those of its first layer if it is stacked.
    Every leaf has them in its state too (`peft_jax.core.adapted_tree.tied` hands them over), so that gradients of all
    leaves add up in the first.
    """

    def initial(self, sizes: Mapping[str, tuple[int, int]], key: jax.Array) -> dict[str, jax.Array]:
        """The arrays of a fresh adapter, float32."""
        raise NotImplementedError

    def share(self, shared: Mapping[str, Any], sizes: tuple[int, int], stack: tuple[int, ...]) -> dict[str, Any]:
        """The place in a leaf's state that `tied` fills."""
        return {ADAPTER: {}}

    @staticmethod
    def carry(shared: Mapping[str, Any], stack: tuple[int, ...]) -> dict[str, jax.Array]:
        """The arrays in the ``params`` of the first leaf, whose stacked axes are ``stack``."""
        first = (0,) * len(stack)
        own = {role: jnp.asarray(array) for role, array in shared.items()}
        return {role: jnp.zeros((*stack, *array.shape)).at[first].set(array) for role, array in own.items()}

    @staticmethod
    def all_layers(params: Arrays, state: Mapping[str, Any], role: str) -> jax.Array:
        """One of the arrays, as a leaf computes with it."""
        shared = state[ADAPTER]
        return shared[role] if role in shared else params[role]
