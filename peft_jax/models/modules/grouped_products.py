"""Products of rows in groups, each group with a matrix of its own: what the experts of a mixture compute."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

LARGEST_BLOCK = 64  # rows of a block on the CPU


def grouped_product(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """The product of each row with the matrix of its group.

    On TPU and GPU this is ``jax.lax.ragged_dot``. On the CPU XLA computes every row with every matrix for that, so
    there the rows are multiplied in blocks, each with the matrix of its group (`product_in_blocks`). Either way no
    matrix is copied for the backward pass, and one block's matrix at a time is sliced on the CPU alone.

    Args:
        x: Rows ``(rows, in)``, sorted by group.
        matrices: ``(groups, in, out)``.
        sizes: The rows of each group, int32 ``(groups,)``. Rows behind the last group are those of no group.

    Returns:
        ``(rows, out)``; that of a row of no group is of no meaning, but finite, as is what it adds to gradients: 0.

    Example:
        >>> x = jnp.ones((3, 2))
        >>> matrices = jnp.array([1.0, 2.0])[:, None, None] * jnp.ones((2, 2, 1))
        >>> grouped_product(x, matrices, jnp.array([1, 2])).ravel().tolist()
        [2.0, 4.0, 4.0]
    """
    found: jax.Array = jax.lax.platform_dependent(x, matrices, sizes, cpu=product_in_blocks, default=_ragged_product)
    return found


def _ragged_product(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """``jax.lax.ragged_dot``, with zeros in rows of no group, which kernels may leave as the memory was."""
    in_group = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    y = jax.lax.ragged_dot(jnp.where(in_group, x, 0), matrices, sizes)  # both ways, so that gradients have them too
    return jnp.where(in_group, y, 0)


def product_in_blocks(x: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_product` as a scan over blocks of rows of one group.

    A group's last block reaches into the rows of the next one, which overwrites them. The number of blocks is known
    beforehand, as the groups' sizes are not: blocks that are not needed are those of padding behind the rows.
    """
    rows, groups = len(x), len(sizes)
    size = _block_size(rows, groups)
    blocks = (rows + min(groups, rows) * (size - 1)) // size
    of_group = -(-sizes // size)
    behind = jnp.cumsum(of_group)
    number = jnp.arange(blocks)
    is_behind = behind[None, :] <= number[:, None]  # no searchsorted: JAX 0.12 does not lower it within a cond
    group = jnp.minimum(is_behind.sum(axis=1), groups - 1)
    in_group = number - (behind - of_group)[group]
    start = jnp.minimum((jnp.cumsum(sizes) - sizes)[group] + in_group * size, rows)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    # Without the checkpoint, autodiff keeps the matrix of every block.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def multiplied(padded: jax.Array, matrices: jax.Array, group: jax.Array, start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, start, size)
        return part @ jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)

    def body(y: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        group, start = block
        part = multiplied(padded, matrices, group, start)
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start, 0), None

    empty = jnp.zeros((rows + size, matrices.shape[2]), jnp.promote_types(x.dtype, matrices.dtype))
    y, _ = jax.lax.scan(body, empty, (group, start))
    return y[:rows]


def _block_size(rows: int, groups: int) -> int:
    """A size at which blocks that are partly or not needed cost little beside the others."""
    size = 1
    while 2 * size <= min(LARGEST_BLOCK, rows // (2 * groups)):
        size *= 2
    return size
