"""The activation functions, by transformers' names for them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]

_gelu = partial(jax.nn.gelu, approximate=False)
_gelu_tanh = partial(jax.nn.gelu, approximate=True)


def _gelu_10(x: jax.Array) -> jax.Array:
    return jnp.clip(_gelu(x), -10, 10)


def _gelu_fast(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _laplace(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _mish(x: jax.Array) -> jax.Array:
    return x * jnp.tanh(jax.nn.softplus(x))


def _identity(x: jax.Array) -> jax.Array:
    return x


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _sqrtsoftplus(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jax.nn.softplus(x))


# All of transformers' ACT2FN but "prelu" and "xielu", which have parameters.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": _gelu,
        "gelu_pytorch_tanh": _gelu_tanh,
        "relu": jax.nn.relu,
        "gelu_new": _gelu_tanh,
        "gelu_10": _gelu_10,
        "gelu_accurate": _gelu_tanh,
        "gelu_fast": _gelu_fast,
        "gelu_python": _gelu,
        "gelu_python_tanh": _gelu_tanh,
        "hardswish": jax.nn.hard_swish,
        "laplace": _laplace,
        "leaky_relu": jax.nn.leaky_relu,
        "linear": _identity,
        "mish": _mish,
        "quick_gelu": _quick_gelu,
        "relu2": _relu2,
        "relu6": jax.nn.relu6,
        "sigmoid": jax.nn.sigmoid,
        "sqrtsoftplus": _sqrtsoftplus,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)


def check_activation(field: str, name: str) -> None:
    """Raise ValueError if there is no such activation.

    Args:
        field: The field of a config that names it.
        name: What it says.

    Example:
        >>> check_activation("hidden_act", "xielu")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: hidden_act='xielu' is not supported. Supported: silu, gelu, gelu_pytorch_tanh, relu, ...
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is not supported. Supported: {', '.join(ACTIVATIONS)}.")
