"""Ids of rows of a table: a check of those that have values, and NaN for wrong ones instead of a wrapped index."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from peft_jax.core.untrained_row import untrained_row


def id_range(ids: npt.ArrayLike | jax.Array, ignored: int | None = None) -> tuple[int, int] | None:
    """The smallest and the largest of some ids; None where there are none, or none yet, as under `jax.jit`.

    Of an array on a device this waits for its values and copies them to the host. Of one that spans several processes
    each process sees its own part.

    Args:
        ids: Numbers, an array of NumPy or of JAX.
        ignored: An id that is ignored.

    Example:
        >>> id_range(jnp.array([3, -100, 1]), ignored=-100)
        (1, 3)
    """
    if isinstance(ids, jax.core.Tracer):
        return None
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        parts = [np.asarray(shard.data).ravel() for shard in ids.addressable_shards]
        found = np.concatenate(parts)
    else:
        found = np.asarray(ids)
    if ignored is not None:
        found = found[found != ignored]
    if not found.size:
        return None
    return int(found.min()), int(found.max())


def is_outside(ids: npt.ArrayLike | jax.Array, count: int, ignored: int | None = None) -> tuple[int, int] | None:
    """The range of ids if it leaves 0 to ``count - 1``, else None; see `id_range`."""
    found = id_range(ids, ignored)
    if found is None:
        return None
    smallest, largest = found
    return found if smallest < 0 or largest >= count else None


def rows_at(table: jax.Array, ids: jax.Array, untrained: int | None = None) -> jax.Array:
    """Rows of a table ``(n, ...)``; an id below 0 or above n - 1 gives NaN, where `jax.numpy.take` wraps negative ones.

    Args:
        table: The table.
        ids: Indices of its rows.
        untrained: A row that gets no gradient, as PyTorch's ``padding_idx``.

    Example:
        >>> rows_at(jnp.array([[1.0], [2.0]]), jnp.array([1, 2, -1])).tolist()
        [[2.0], [nan], [nan]]
    """
    if untrained is not None:
        table = untrained_row(table, untrained)
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
