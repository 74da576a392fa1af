"""A shadow's state in the layers of a decoder: it corrects each layer's input, and takes in each layer's output.

ShadowPEFT, sections 3.2 and 3.3, as PEFT 0.21.2 computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.dropout import kept_elements


class Perceptron(NamedTuple):
    """A network of two layers with a GELU between them, in PyTorch's orientation.

    Attributes:
        inner: The first kernel ``(hidden, features)``.
        inner_bias: Its bias ``(hidden,)``.
        outer: The second kernel ``(features, hidden)``.
        outer_bias: Its bias ``(features,)``.
    """

    inner: jax.Array
    inner_bias: jax.Array
    outer: jax.Array
    outer_bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, features)."""
        hidden = jax.nn.gelu(x @ self.inner.T + self.inner_bias[None, None], approximate=False)
        return hidden @ self.outer.T + self.outer_bias[None, None]


class ShadowLayers(NamedTuple):
    """The part of a shadow in a layer, or with an axis of layers in front in all of them.

    Attributes:
        on: Whether the layer is one of the adapter's.
        alpha: What the correction is multiplied by.
        down: ``(rank, features)``.
        up: ``(features, rank)``.
        transform: The candidate for the next state.
        gate: How much of the candidate the next state has, before the sigmoid.
        dropout: Rate and random key in training; empty without.
    """

    on: jax.Array
    alpha: jax.Array
    down: jax.Array
    up: jax.Array
    transform: Perceptron
    gate: Perceptron
    dropout: dict[str, jax.Array]

    def corrected(self, x: jax.Array, state: jax.Array) -> jax.Array:
        """A layer's input, equations 2 to 4: ``x + alpha (x - state) W_down W_up``, all (batch, length, features)."""
        difference = (x - state).astype(self.down.dtype)
        if self.dropout:
            keep = 1 - self.dropout["rate"]
            kept = kept_elements(self.dropout["key"], keep, difference.shape)
            difference = jnp.where(kept, difference / keep.astype(difference.dtype), 0)
        correction = self.alpha.astype(difference.dtype) * (difference @ self.down.T @ self.up.T)
        return x + jnp.where(self.on, correction, 0).astype(x.dtype)

    def moved(self, y: jax.Array, state: jax.Array) -> jax.Array:
        """The state after a layer's output, equations 5 to 7: ``(1 - g) state + g T(y)``, ``g = sigmoid(G(y))``."""
        wide = y.astype(self.down.dtype)
        gate = jax.nn.sigmoid(self.gate(wide))
        following = (1 - gate) * state.astype(gate.dtype) + gate * self.transform(wide)
        return jnp.where(self.on, following.astype(state.dtype), state)


class Shadow(NamedTuple):
    """A shadow before the first layer: its state ``(batch, length, features)``, and its part in all layers."""

    state: jax.Array
    layers: ShadowLayers


Layer = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def beside_shadow(layer: Layer, shadow: ShadowLayers | None, x: jax.Array, handed: Any) -> tuple[jax.Array, Any]:
    """Call a layer, with a shadow's state beside what layers hand on if there is one.

    Args:
        layer: From its input and what is handed on to its output and the same of the next.
        shadow: The layer's part of a shadow.
        x: Its input (batch, length, features).
        handed: The tree that layers hand on; with a shadow a pair of it and the state.
    """
    if shadow is None:
        return layer(x, handed)
    handed, state = handed
    y, handed = layer(shadow.corrected(x, state), handed)
    return y, (handed, shadow.moved(y, state))


def with_state(handed: Any, shadow: Shadow | None) -> Any:
    """The tree that the first layer is handed: with a shadow a pair of it and the state."""
    return handed if shadow is None else (handed, shadow.state)


def without_state(handed: Any, shadow: Shadow | None) -> Any:
    """The inverse of `with_state`, of the tree that the last layer hands on."""
    return handed if shadow is None else handed[0]


def layers_of(shadow: Shadow | None) -> ShadowLayers | None:
    """The part of a shadow in all layers, if there is one."""
    return None if shadow is None else shadow.layers
