"""Rounding to an element type that compilers keep."""

import jax
import jax.numpy as jnp

SMALLEST_NORMAL = 2.0**-14  # of float16
STEPS = 2.0**24  # one over the distance of subnormal float16


def rounded_to(array: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """Float32 rounded to the values that bfloat16 or float16 has, still in float32.

    A conversion there and back would say the same, but compilers leave such pairs out.

    Args:
        array: float32 of any shape.
        dtype: The element type; None and float32 change nothing.

    Example:
        >>> rounded_to(jnp.array([1.001, 1e-7]), jnp.dtype("float16")).tolist() == [1.0009765625, 2.0**-23]
        True
    """
    if dtype is None or dtype == jnp.float32:
        return array
    found = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(array, found.nexp, found.nmant)
    if dtype != jnp.float16:
        return rounded
    # reduce_precision has no subnormal numbers.
    return jnp.where(jnp.abs(array) < SMALLEST_NORMAL, jnp.round(array * STEPS) / STEPS, rounded)
