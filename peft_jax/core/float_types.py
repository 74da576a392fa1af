"""Floating-point types of 16 bits and more, and sums in the wider of two."""

import jax
import jax.numpy as jnp


def is_wide_float(dtype: jnp.dtype) -> bool:
    """Whether an element type is a floating-point one of at least 16 bits.

    Example:
        >>> is_wide_float(jnp.dtype("bfloat16")), is_wide_float(jnp.dtype("float8_e4m3fn"))
        (True, False)
    """
    return bool(jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16)


def wider_float(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """The wider of two floating-point types; float32 for bfloat16 and float16.

    Example:
        >>> wider_float(jnp.dtype("bfloat16"), jnp.dtype("float16"))
        dtype('float32')
    """
    bits_a, bits_b = jnp.finfo(a).bits, jnp.finfo(b).bits
    if bits_a == bits_b and a != b:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(a if bits_a >= bits_b else b)


def added(y: jax.Array, update: jax.Array) -> jax.Array:
    """``y + update`` in the type of ``y``, added in the wider of their types.

    Example:
        >>> added(jnp.float32([1]), jnp.bfloat16([0])).dtype
        dtype('float32')
    """
    wide = wider_float(y.dtype, update.dtype)
    return (y.astype(wide) + update.astype(wide)).astype(y.dtype)
