"""Two numbers of 4 bits in a byte.

A byte holds one number of the first half of a block and one of the second half, not two neighbours: unpacking is then
a shift of bytes that are repeated along a new axis, which compilers fuse into what uses it.
"""

import jax
import jax.numpy as jnp


def pack(codes: jax.Array) -> jax.Array:
    """Numbers ``(..., 2 * rows, out)`` from 0 to 15 as bytes ``(..., rows, out)``.

    Example:
        >>> pack(jnp.array([[1], [2], [3], [4]])).ravel().tolist()  # 1 + 16 * 3, 2 + 16 * 4
        [49, 66]
    """
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-2)
    return low | (high << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of `pack` with the halves apart: ``(..., 2, rows, out)``.

    Example:
        >>> unpack(jnp.array([[49], [66]], jnp.uint8)).ravel().tolist()
        [1, 2, 3, 4]
    """
    shifts = jnp.array([0, 4], jnp.uint8).reshape(*(1,) * (packed.ndim - 2), 2, 1, 1)
    return (packed[..., None, :, :] >> shifts) & 15


def halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of `unpack`, as arrays of the shape of ``packed``.

    Example:
        >>> [half.ravel().tolist() for half in halves(jnp.array([[49], [66]], jnp.uint8))]
        [[1, 2], [3, 4]]
    """
    return packed & 15, packed >> 4


def unpacked_at(packed: jax.Array, row: jax.Array) -> jax.Array:
    """The numbers of some rows of ``(blocks, 2 * rows, out)``, counted through all blocks: ``(*row.shape, out)``.

    Args:
        packed: ``(blocks, rows, out)``, from `pack`.
        row: Numbers of rows.

    Example:
        >>> unpacked_at(jnp.array([[[49], [66]]], jnp.uint8), jnp.array([0, 3])).ravel().tolist()
        [1, 4]
    """
    _, rows, n_out = packed.shape
    block, place = row // (2 * rows), row % (2 * rows)
    found = packed.reshape(-1, n_out)[block * rows + place % rows]
    shift = (4 * (place // rows)).astype(jnp.uint8)
    return (found >> shift[..., None]) & 15
