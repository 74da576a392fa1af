"""Work on long sequences in chunks of their positions, so that large results are never there at once.

All rows of a batch are in each chunk: rows may be on several devices, and may have adapters of their own.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def chunk_size(shape: Sequence[int], limit: int) -> int:
    """Positions of a chunk, spread evenly.

    Args:
        shape: Of a result whose second axis is the positions.
        limit: Elements of it that may be on each device at once.

    Example:
        >>> chunk_size((2, 100, 50), 5000 // jax.device_count())
        50
    """
    chunks = max(1, math.ceil(math.prod(shape) / (limit * jax.device_count())))
    return math.ceil(shape[1] / chunks)


def in_chunks(array: jax.Array, size: int) -> jax.Array:
    """(batch, length, ...) as (chunks, batch, size, ...), filled up with zeros.

    Example:
        >>> in_chunks(jnp.array([[1, 2, 3]]), 2).tolist()
        [[[1, 2]], [[3, 0]]]
    """
    batch, length, *rest = array.shape
    chunks = math.ceil(length / size)
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, chunks * size - length)
    array = jnp.pad(array, padding)
    return jnp.swapaxes(array.reshape(batch, chunks, size, *rest), 0, 1)


def out_of_chunks(parts: jax.Array, length: int) -> jax.Array:
    """The inverse of `in_chunks`, for an array of ``length`` positions.

    Example:
        >>> out_of_chunks(jnp.array([[[1, 2]], [[3, 0]]]), 3).tolist()
        [[1, 2, 3]]
    """
    chunks, batch, size, *rest = parts.shape
    return jnp.swapaxes(parts, 0, 1).reshape(batch, chunks * size, *rest)[:, :length]
