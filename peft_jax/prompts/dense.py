"""The layers of prompt encoders, as PyTorch computes and initializes them; arrays are in a flat dictionary."""

from collections.abc import Mapping

import jax

from peft_jax.methods.base import Arrays

Shapes = Mapping[str, tuple[int, ...]]


def linear_shapes(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """Kernel and bias of a linear layer.

    Example:
        >>> linear_shapes("up", 2, 3)
        {'up_kernel': (2, 3), 'up_bias': (3,)}
    """
    return {f"{name}_kernel": (n_in, n_out), f"{name}_bias": (n_out,)}


def linear(params: Arrays, name: str, x: jax.Array) -> jax.Array:
    """``x W + b``.

    Example:
        >>> linear({"up_kernel": jnp.eye(2), "up_bias": jnp.ones(2)}, "up", jnp.ones((1, 2))).tolist()
        [[2.0, 2.0]]
    """
    return x @ params[f"{name}_kernel"] + params[f"{name}_bias"][None]


def started(shape: tuple[int, ...], fan_in: int, key: jax.Array) -> jax.Array:
    """As PyTorch starts the arrays of a linear layer or an LSTM: uniform within 1 / sqrt(fan_in)."""
    return jax.random.uniform(key, shape, minval=-1.0) / fan_in**0.5
