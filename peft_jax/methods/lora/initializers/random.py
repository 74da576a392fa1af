"""How LoRA's factors start where the base's numbers do not matter: zeros and draws, as PEFT's reset_lora_parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.paths import drawn_in_turn, keys_from_codes, name_codes
from peft_jax.core.selecting import picked

Draw = Callable[[jax.Array, jax.Array], jax.Array]  # of a key and the rank


def drawn(
    init: bool | str, layout: Layout, shape: tuple[int, ...], names: np.ndarray, ranks: np.ndarray, key: jax.Array
) -> dict[str, jax.Array]:
    """``lora_A`` ``(*stack, in, rank)`` and ``lora_B`` ``(*stack, rank, out)``, float32, zero beyond each layer's rank.

    Of a convolution with groups ``in`` are the inputs of all, and ``lora_B`` is ``(*stack, rank / groups, out)``.

    Args:
        init: True (A as PyTorch's Linear, B zero), False (both random), ``"gaussian"``; all else is True.
        layout: Axes of the leaf.
        shape: Its shape.
        names: Names of its layers.
        ranks: Their ranks, 0 where they are not adapted.
        key: Random key.
    """
    n_in, n_out = layout.sizes(shape)
    inner, experts = ranks // layout.groups, math.prod(picked(names.shape, layout.unnamed))
    shape_a, shape_b = (n_in * layout.groups, int(ranks.max())), (int(inner.max()), n_out)
    draws = _Draws(init, shape_a, shape_b, layout.lookup, experts)
    return _factors(key, name_codes(names), ranks.astype(np.int32), inner.astype(np.int32), draws)


class _Draws(NamedTuple):
    """How both factors of a leaf are drawn; one program is compiled for all leaves alike."""

    init: bool | str
    shape_a: tuple[int, int]
    shape_b: tuple[int, int]
    lookup: bool
    experts: int


@partial(jax.jit, static_argnames="draws")
def _factors(
    key: jax.Array, codes: jax.Array, ranks: jax.Array, inner: jax.Array, draws: _Draws
) -> dict[str, jax.Array]:
    draw_a, draw_b = _draws(*draws)
    a, b = jnp.zeros((*codes.shape, *draws.shape_a)), jnp.zeros((*codes.shape, *draws.shape_b))
    if draw_a is not None:
        a = jnp.where(_used(ranks, draws.shape_a[1])[..., None, :], _of_each_layer(draw_a, codes, ranks, key, 0), 0)
    if draw_b is not None:
        b = jnp.where(_used(inner, draws.shape_b[0])[..., :, None], _of_each_layer(draw_b, codes, inner, key, 1), 0)
    return {"lora_A": a, "lora_B": b}


def drawn_bias(init: bool | str, n_out: int, names: np.ndarray, ranks: np.ndarray, key: jax.Array) -> jax.Array:
    """The trained bias ``(*stack, out)``: zero, or random as that of PyTorch's Linear with inputs of these ranks."""
    if init is not False:
        return jnp.zeros((*names.shape, n_out))
    bias = _of_each_layer(_uniform((n_out,), None), name_codes(names), jnp.asarray(ranks), key, 2)
    return jnp.where(jnp.asarray(ranks > 0)[..., None], bias, 0)


def _used(ranks: jax.Array, largest: int) -> jax.Array:
    return jnp.expand_dims(jnp.arange(largest), range(ranks.ndim)) < ranks[..., None]


def _of_each_layer(
    draw: Draw, codes: np.ndarray | jax.Array, ranks: jax.Array, key: jax.Array, number: int
) -> jax.Array:
    return drawn_in_turn(draw, keys_from_codes(jax.random.fold_in(key, number), codes), ranks)


def _draws(
    init: bool | str, shape_a: tuple[int, int], shape_b: tuple[int, int], lookup: bool, experts: int
) -> tuple[Draw | None, Draw | None]:
    """How A and B are drawn; None for zeros, which need no keys: to lower those takes longer than all else."""
    if lookup:
        return (_normal(shape_a) if init is False else None), _normal(shape_b)
    if init == "gaussian":
        return _gaussian(shape_a), None
    return _uniform(shape_a, shape_a[0]), _uniform(shape_b, None, experts) if init is False else None


def _normal(shape: tuple[int, ...]) -> Draw:
    return lambda key, rank: jax.random.normal(key, shape)


def _gaussian(shape: tuple[int, ...]) -> Draw:
    return lambda key, rank: _divided(jax.random.normal(key, shape), jnp.float32(jnp.maximum(rank, 1)))


def _uniform(shape: tuple[int, ...], fan_in: int | None, experts: int = 1) -> Draw:
    """As PyTorch's Linear, within 1 / sqrt(fan_in); the rank is that of what B takes, for all experts together."""
    return lambda key, rank: _divided(
        jax.random.uniform(key, shape, minval=-1.0), jnp.sqrt(jnp.float32(fan_in or experts * jnp.maximum(rank, 1)))
    )


def _divided(draws: jax.Array, number: jax.Array) -> jax.Array:
    """The quotient to the last bit: a compiler that knows the number would multiply by its reciprocal instead."""
    draws, number = jax.lax.optimization_barrier((draws, number))
    return draws / number
