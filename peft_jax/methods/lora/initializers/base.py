"""The interface of an initializer: it sees one layer's matrix, and gives the factors that the layer starts with."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Factors(NamedTuple):
    """A layer's factors A ``(in, rank)`` and B ``(rank, out)``, and its new base matrix; None keeps the base."""

    a: jax.Array
    b: jax.Array
    matrix: jax.Array | None = None


Initialize = Callable[[jax.Array, int, float, jax.Array], Factors]
"""From a layer's matrix ``(in, out)``, rank, scale and random key to its factors."""
