"""A long short-term memory in both directions, as PyTorch's LSTM computes it, over one sequence."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.dropout import dropout
from peft_jax.methods.base import Arrays

DIRECTIONS = ("forward", "backward")


def lstm_shapes(n_in: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Its arrays: of each layer and direction the kernels of inputs and hidden state, and a bias beside each.

    Example:
        >>> lstm_shapes(3, 2, 1)["lstm_0_backward_input_kernel"]
        (3, 8)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for direction in DIRECTIONS:
            name = f"lstm_{layer}_{direction}"
            shapes[f"{name}_input_kernel"] = (2 * hidden if layer else n_in, 4 * hidden)
            shapes[f"{name}_hidden_kernel"] = (hidden, 4 * hidden)
            shapes[f"{name}_input_bias"] = shapes[f"{name}_hidden_bias"] = (4 * hidden,)
    return shapes


def lstm(params: Arrays, x: jax.Array, layers: int, state: Mapping[str, Any]) -> jax.Array:
    """Run all layers over x (length, features); gives (length, 2 * hidden).

    Between layers there is dropout, if it is switched on in ``state``; each has its own key.
    """
    for layer in range(layers):
        if layer and "dropout" in state:
            key = jax.random.fold_in(state["dropout"]["key"], layer)
            x = dropout(x, {"dropout": {**state["dropout"], "key": key}})
        parts = [_run(params, f"lstm_{layer}_{direction}", x, direction == "backward") for direction in DIRECTIONS]
        x = jnp.concatenate(parts, axis=-1)
    return x


def _run(params: Arrays, name: str, x: jax.Array, reverse: bool) -> jax.Array:
    """One layer in one direction."""
    kernel, bias = params[f"{name}_hidden_kernel"], params[f"{name}_input_bias"] + params[f"{name}_hidden_bias"]
    gates = x @ params[f"{name}_input_kernel"] + bias[None]

    def step(carry: tuple[jax.Array, jax.Array], gate: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, cell = carry
        i, f, new, o = jnp.split(gate + h @ kernel, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(new)
        h = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (h, cell), h

    zeros = jnp.zeros(kernel.shape[0], x.dtype)
    return jax.lax.scan(step, (zeros, zeros), gates, reverse=reverse)[1]
