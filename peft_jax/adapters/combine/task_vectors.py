"""Ways to make one tensor of several: weighted sums, of pruned tensors, of those that agree in sign.

Task arithmetic: Ilharco et al., 2022, https://arxiv.org/abs/2212.04089; TIES: Yadav et al., 2023,
https://arxiv.org/abs/2306.01708; DARE: Yu et al., 2023, https://arxiv.org/abs/2311.03099. Numbers follow PEFT 0.21.2,
``utils/merge_utils.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

Prune = Callable[[jax.Array, jax.Array], jax.Array]  # of a tensor and a key
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # ways that need a density
SIGNED = ("ties", "dare_ties")  # ways that elect signs


def combine(
    way: str, tensors: Sequence[jax.Array], weights: Sequence[float], density: float, sign: str, key: jax.Array
) -> jax.Array:
    """One tensor of several of one shape.

    Args:
        way: ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` or ``"magnitude_prune"``.
        tensors: The tensors.
        weights: One each.
        density: Part of the elements that pruning keeps.
        sign: What elects a sign where elements disagree: ``"total"``, their sum, or ``"frequency"``, their number.
        key: Random key, for what is pruned by chance.
    """
    prunes: dict[str, Prune] = {"ties": partial(_smallest, density), "magnitude_prune": partial(_smallest, density)}
    prune = prunes.get(way, partial(_random, density) if way.startswith("dare") else lambda tensor, key: tensor)
    stacked = jnp.stack([prune(tensor, jax.random.fold_in(key, i)) for i, tensor in enumerate(tensors)])
    weighted = stacked * jnp.reshape(jnp.array(weights, stacked.dtype), (-1, *[1] * (stacked.ndim - 1)))
    if way not in SIGNED:
        return jnp.sum(weighted, axis=0)
    signs = jnp.sign(stacked)
    elected = jnp.where(jnp.sum(stacked if sign == "total" else signs, axis=0) >= 0, 1, -1)
    agree = (signs == elected[None]).astype(stacked.dtype)
    return jnp.sum(weighted * agree, axis=0) / jnp.maximum(jnp.sum(agree, axis=0), 1)


def _smallest(density: float, tensor: jax.Array, key: jax.Array) -> jax.Array:
    """The tensor with all but its largest elements zero."""
    flat = tensor.reshape(-1)
    _, kept = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(tensor.shape)


def _random(density: float, tensor: jax.Array, key: jax.Array) -> jax.Array:
    """The tensor with elements zero by chance, and the rest larger by as much."""
    return jnp.where(jax.random.bernoulli(key, density, tensor.shape), tensor / density, 0)
