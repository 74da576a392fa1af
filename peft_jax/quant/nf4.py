"""NF4: 4-bit floats whose 16 values are quantiles of a normal distribution, with one scale for each 64 elements.

Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E. Simulated: values are rounded to the
grid and kept in floats.
"""

import jax
import jax.numpy as jnp

BLOCK = 64
# fmt: off
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def round_to_nf4(array: jax.Array) -> jax.Array:
    """The array with each element at the nearest of 16 values, scaled by the largest of its block of 64.

    Blocks follow the array's memory, row by row; the last may be shorter. A block of subnormal float32 numbers becomes
    zeros, and one with a NaN or an infinity becomes NaN as a whole.

    Example:
        >>> round_to_nf4(jnp.array([0.1, -2.0, 0.3])).tolist()
        [0.15916059911251068, -2.0, 0.3218604028224945]
    """
    flat = array.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    values = jnp.array(VALUES, jnp.float32)
    largest = jnp.where(largest < jnp.finfo(jnp.float32).tiny, 0, largest)
    place = jnp.searchsorted((values[1:] + values[:-1]) / 2, blocks / jnp.where(largest == 0, 1, largest))
    return (values[place] * largest).reshape(-1)[: flat.size].reshape(array.shape).astype(array.dtype)
