"""How LoRA's factors start where the base's numbers do not matter: zeros and draws, as PEFT's reset_lora_parameters."""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.paths import drawn_in_turn, keys_from_codes, name_codes
from peft_jax.core.selecting import picked

FIRST, SECOND, BIAS = range(3)  # what is drawn of a leaf: each has random keys of its own
Kind = Literal["zero", "normal", "gaussian", "uniform"]


class _Drawing(NamedTuple):
    """How an array of a leaf is drawn; one program is compiled for all that are drawn alike.

    Attributes:
        part: Which array of the leaf it is.
        kind: Zeros, normal numbers, normal ones over the rank ("gaussian"), or uniform ones as PyTorch's Linear,
            within 1 / sqrt(fan_in).
        shape: Of one layer's array.
        fan_in: For uniform ones; None for the rank, of all experts together.
        experts: How many there are.
    """

    part: int
    kind: Kind
    shape: tuple[int, ...]
    fan_in: int | None = None
    experts: int = 1


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
    kinds: tuple[Kind, Kind] = ("uniform", "uniform" if init is False else "zero")
    if layout.lookup:
        kinds = ("normal" if init is False else "zero", "normal")
    elif init == "gaussian":
        kinds = ("gaussian", "zero")
    codes, first = name_codes(names), _Drawing(FIRST, kinds[0], shape_a, fan_in=shape_a[0])
    second = _Drawing(SECOND, kinds[1], shape_b, experts=experts)
    return {
        "lora_A": _factor(key, codes, ranks.astype(np.int32), first),
        "lora_B": _factor(key, codes, inner.astype(np.int32), second),
    }


def drawn_bias(init: bool | str, n_out: int, names: np.ndarray, ranks: np.ndarray, key: jax.Array) -> jax.Array:
    """The trained bias ``(*stack, out)``: zero, or random as that of PyTorch's Linear with inputs of these ranks."""
    if init is not False:
        return jnp.zeros((*names.shape, n_out))
    bias = _random(key, name_codes(names), jnp.asarray(ranks), _Drawing(BIAS, "uniform", (n_out,)))
    return jnp.where(jnp.asarray(ranks > 0)[..., None], bias, 0)


@partial(jax.jit, static_argnames="drawing")
def _factor(key: jax.Array, codes: jax.Array, ranks: jax.Array, drawing: _Drawing) -> jax.Array:
    """A factor of all layers, zero beyond their ranks."""
    shape = (*ranks.shape, *drawing.shape)
    if drawing.kind == "zero":  # without keys: to lower those takes longer than all else
        return jnp.zeros(shape)
    rank_axis = ranks.ndim + (1 if drawing.part == FIRST else 0)
    is_used = jax.lax.broadcasted_iota(jnp.int32, shape, rank_axis) < ranks[..., None, None]
    return jnp.where(is_used, _random(key, codes, ranks, drawing), 0)


@partial(jax.jit, static_argnames="drawing")
def _random(key: jax.Array, codes: np.ndarray | jax.Array, ranks: jax.Array, drawing: _Drawing) -> jax.Array:
    """The numbers of all layers, with the axes of the codes in front."""
    keys = keys_from_codes(jax.random.fold_in(key, drawing.part), codes)
    return drawn_in_turn(partial(_of_layer, drawing), keys, ranks)


def _of_layer(drawing: _Drawing, key: jax.Array, rank: jax.Array) -> jax.Array:
    """The numbers of one layer of this rank."""
    least = jnp.maximum(rank, 1)
    if drawing.kind == "uniform":
        inputs = jnp.float32(drawing.fan_in or drawing.experts * least)
        return _divided(jax.random.uniform(key, drawing.shape, minval=-1.0), jnp.sqrt(inputs))
    numbers = jax.random.normal(key, drawing.shape)
    return _divided(numbers, jnp.float32(least)) if drawing.kind == "gaussian" else numbers


def _divided(draws: jax.Array, number: jax.Array) -> jax.Array:
    """The quotient to the last bit: a compiler that knows the number would multiply by its reciprocal instead."""
    draws, number = jax.lax.optimization_barrier((draws, number))
    return draws / number
