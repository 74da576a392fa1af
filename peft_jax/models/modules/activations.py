"""The activation functions, by transformers' names for them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import jax

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
        "gelu_new": partial(jax.nn.gelu, approximate=True),
    }
)


def check_activation(field: str, name: str) -> None:
    """Raise ValueError if there is no such activation.

    Args:
        field: The field of a config that names it.
        name: What it says.

    Example:
        >>> check_activation("hidden_act", "swish")
        Traceback (most recent call last):
        ...
        ValueError: hidden_act='swish' is not supported. Supported: silu, gelu, gelu_pytorch_tanh, relu, gelu_new.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}={name!r} is not supported. Supported: {', '.join(ACTIVATIONS)}.")
