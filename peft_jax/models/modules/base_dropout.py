"""The base model's own dropout: its rates, its sites, and the masks, which are pure functions of a key.

A key reaches a model in `ForwardInputs.dropout_key`; without one, as in evaluation and generation, nothing is dropped.
Each layer folds its number into the key, and each site in it its own number, so that no two masks are alike and a layer
that is recomputed in the backward pass draws the masks that it drew before.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.dropout import kept_elements


class DropoutRates(NamedTuple):
    """The probabilities with which a model drops in training, by place.

    Attributes:
        embedding: Elements of the first layer's input.
        attention: Weights of the attention, after the softmax.
        attention_out: Outputs of the attention, before they are added to the residual stream.
        mlp_out: Outputs of the feed-forward network, before they are added to it.
        inner: The feed-forward network's features between its projections.
        final: Outputs of the final norm.
        layer: Whole layers (LayerDrop).
        head: Inputs of the task's head.
    """

    embedding: float = 0.0
    attention: float = 0.0
    attention_out: float = 0.0
    mlp_out: float = 0.0
    inner: float = 0.0
    final: float = 0.0
    layer: float = 0.0
    head: float = 0.0


NO_DROPOUT = DropoutRates()


class Site(enum.IntEnum):
    """A place that draws a mask of its own."""

    EMBEDDING = 0
    LAYERS = 1
    FINAL = 2
    HEAD = 3
    HEAD_OUT = 4
    ATTENTION = 5
    ATTENTION_OUT = 6
    CROSS_ATTENTION = 7
    INNER = 8
    MLP_OUT = 9
    WHOLE = 10
    ENCODER = 11
    DECODER = 12


def key_of(key: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
    """The key of a site, a layer or a stack, by its number, from the key of the whole; None stays None.

    Example:
        >>> key_of(None, Site.LAYERS) is None
        True
    """
    return None if key is None else jax.random.fold_in(key, number)


def dropped(x: jax.Array, key: jax.Array | None, rate: float, site: Site) -> jax.Array:
    """X with elements zeroed and the rest scaled up by ``1 / (1 - rate)``; x itself without a key or a rate.

    Args:
        x: Any array.
        key: The key of the model or the layer that the site is in.
        rate: The probability of an element to be zeroed.
        site: Which mask.

    Example:
        >>> dropped(jnp.ones(4), jax.random.key(0), 1.0, Site.HEAD).tolist()
        [0.0, 0.0, 0.0, 0.0]
        >>> dropped(jnp.ones(4), None, 0.5, Site.HEAD).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if key is None or not rate:
        return x
    if rate >= 1:
        return jnp.zeros_like(x)
    mask = kept_elements(jax.random.fold_in(key, site), 1 - rate, x.shape)
    return jnp.where(mask, x / jnp.asarray(1 - rate, x.dtype), 0)


def layer_or_input(x: jax.Array, before: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """The output x of a layer, or with the probability ``rate`` its input ``before``, as if there were no such layer.

    Args:
        x: The output.
        before: The input, of the same shape.
        key: The layer's key.
        rate: The probability.

    Example:
        >>> float(layer_or_input(jnp.ones(()), jnp.zeros(()), jax.random.key(0), 1.0))
        0.0
    """
    if key is None or not rate:
        return x
    return jnp.where(kept_elements(jax.random.fold_in(key, Site.WHOLE), 1 - rate, ()), x, before)
