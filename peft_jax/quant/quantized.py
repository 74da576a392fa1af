"""The base class of all quantized leaves: what the packages above may know of one without knowing its format."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp

from peft_jax.core.finite import holds_finite
from peft_jax.core.layout import Layout
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import Weight


class Quantized(Weight):
    """A matrix in few bits. Backward keeps the packed arrays and never a dequantized copy.

    Attributes:
        kind: Name of the format, as `peft_jax.quantize` takes it.
    """

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def group_size(self) -> int | None:
        """Elements that share a scale; None for all inputs of an output channel."""

    @abc.abstractmethod
    def requantized(self, array: jax.Array) -> "Quantized":
        """Another array of the same shape, rounded to the same format with the same options.

        Raises:
            ValueError: if it holds values that are not finite.
        """


def check_array(array: jax.Array, layout: Layout) -> None:
    """Raise ValueError unless an array is a floating-point matrix."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"quantize takes floating-point weights, found {array.dtype}. Cast the leaf first.")
    if not layout.inp:
        raise ValueError(f"quantize takes matrices, found a vector of shape {array.shape}. Leave it in float.")


def check_scale(scale: jax.Array, array: jax.Array) -> None:
    """Raise ValueError if the scales show that an array was not finite: they are made of its largest values."""
    if not holds_finite(scale):
        raise ValueError(
            f"quantize takes finite weights, found NaN or infinity in an array of shape {array.shape}. Repair or "
            "replace these weights first."
        )


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
