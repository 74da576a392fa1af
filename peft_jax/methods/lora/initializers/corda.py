"""CorDA: LoRA starts at the directions of a weight as its inputs weigh them.

Yang et al., 2024, https://arxiv.org/abs/2406.05223, equations 1 to 5. Numbers follow PEFT 0.21.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.methods.lora.initializers.base import Factors


def moment(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Second moments of the inputs of one product, scaled by the largest; the last row counts the products."""
    x = x / jnp.abs(jnp.max(x))
    return jnp.pad(jnp.matmul(x.T, x, precision="highest"), ((0, 1), (0, 1))).at[-1, -1].set(1)


def initialize(matrix: jax.Array, covariance: jax.Array, rank: int, scale: float, method: str) -> Factors:
    """CorDA's start: directions of the matrix as its inputs weigh them, the largest ("ipm") or smallest ("kpm").

    Args:
        matrix: ``(in, out)``.
        covariance: Of its inputs, ``(in, in)``.
        rank: How many directions.
        scale: The adapter's.
        method: ``"ipm"`` or ``"kpm"``.
    """
    eye, damp = jnp.eye(len(covariance)), 0.01
    while True:
        damped = covariance + eye * jnp.mean(jnp.diagonal(covariance)) * damp
        inverse = jnp.linalg.inv(damped)
        error = float(jnp.linalg.norm(damped @ inverse - eye))
        if error < 0.05:
            break
        if not np.isfinite(error) or damp > 1e6:
            raise ValueError("CorDA's covariances have no inverse: inputs are zero or not finite. Check the batches.")
        damp *= 2
    u, s, vt = jnp.linalg.svd(matrix.T @ damped, full_matrices=False)
    chosen = slice(None, rank) if method == "ipm" else slice(len(s) - rank, None)
    root = jnp.sqrt(s[chosen] / scale)
    a, b = (vt[chosen] @ inverse).T * root[None], (u[:, chosen] * root[None]).T
    return Factors(a, b, matrix - scale * a @ b)
