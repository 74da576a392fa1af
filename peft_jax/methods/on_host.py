"""Functions of NumPy arrays, in traced programs too."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_host(fn: Callable[..., Any], declared: Any, *arrays: Any) -> Any:
    """The result of a function of NumPy arrays.

    Args:
        fn: From NumPy arrays to a tree of them.
        declared: The shapes and element types of that tree, which a traced program asks for.
        *arrays: Its arguments.

    Example:
        >>> on_host(np.sort, jax.ShapeDtypeStruct((3,), jnp.float32), jnp.array([2.0, 1.0, 3.0])).tolist()
        [1.0, 2.0, 3.0]
    """

    def on_numpy(*given: Any) -> Any:
        return fn(*map(np.asarray, given))

    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return jax.pure_callback(on_numpy, declared, *arrays)
    return jax.tree.map(jnp.asarray, on_numpy(*arrays))
