"""Rotations of skew-symmetric matrices Q: Cayley's map ``(I + Q) (I - Q)^-1``, and PEFT's Neumann series of it.

The series is ``(I + Q) (I + Q + Q² + ...)``, cut off after a few terms: Qiu et al., 2025,
https://arxiv.org/abs/2506.19847. With ``-Q`` in place of Q both give the inverse rotation.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.float_types import wider_float


def skew(angles: Float[Array, "*groups pairs"]) -> Float[Array, "*groups size size"]:
    """Skew-symmetric matrices, whose upper triangles are the angles by rows.

    Example:
        >>> skew(jnp.array([1.0, 2.0, 3.0])).tolist()
        [[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]
    """
    size = (1 + math.isqrt(1 + 8 * angles.shape[-1])) // 2
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((*angles.shape[:-1], size, size), angles.dtype).at[..., rows, columns].set(angles)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(turns: Float[Array, "*groups size size"]) -> Float[Array, "*groups size size"]:
    """``(I + Q) (I - Q)^-1``, in float32 at least, as no solver is for less.

    Example:
        >>> cayley(skew(jnp.array([1.0]))).round(3).tolist()  # by 90 degrees
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    turns = turns.astype(wider_float(turns.dtype, jnp.dtype(jnp.float32)))
    one = jnp.broadcast_to(jnp.eye(turns.shape[-1], dtype=turns.dtype), turns.shape)
    return jnp.swapaxes(jnp.linalg.solve(one + turns, one - turns), -1, -2)  # transposing Q changes its sign


def cayley_series(turns: Float[Array, "*groups size size"], terms: int) -> Float[Array, "*groups size size"]:
    """PEFT's series: 1, 2, 2, ..., 2, 1 times the powers of Q; three terms and four are the same.

    Example:
        >>> cayley_series(skew(jnp.array([0.5])), 2).tolist()  # I + 2 Q
        [[1.0, 1.0], [-1.0, 1.0]]
    """
    one = jnp.broadcast_to(jnp.eye(turns.shape[-1], dtype=turns.dtype), turns.shape)
    factors = [1, *[2] * (max(terms, 4) - 2), 1] if terms > 2 else [1, 2][:terms]
    rotation, power = one, one
    for factor in factors[1:]:
        power = power @ turns
        rotation = rotation + factor * power
    return rotation
