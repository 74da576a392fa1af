"""Search a tree for values that are not finite numbers: NaN and infinities."""

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.paths import dotted
from peft_jax.core.pytree import PyTree


def non_finite(tree: PyTree) -> str | None:
    """The dotted path of the first array that holds a NaN or an infinity; None if all are finite.

    Traced and abstract arrays have no values yet and are passed over, so under `jax.jit` the answer is None.

    Example:
        >>> non_finite({"a": jnp.ones(2), "b": [jnp.array([1.0, jnp.nan])]})
        'b.0'
    """
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not holds_finite(leaf):
            return dotted(key_path)
    return None


def holds_finite(array: object) -> bool:
    """Whether all elements of an array are finite numbers; True where there is nothing to look at yet."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray):
        return True
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())  # on the host: no copy to a device, no program for each shape
    return bool(all_finite(array))


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    """Whether all elements are finite numbers, as a bool array of shape ()."""
    return jnp.all(jnp.isfinite(array))
