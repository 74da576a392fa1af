"""Base class of methods with frozen arrays that all layers share, such as VeRA's random matrices."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax


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
