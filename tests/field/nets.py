"""What a row of the tables of nets is: a function, its parameters and its inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Net:
    """A net of a library, as users call it.

    Attributes:
        fn: ``fn(params, *inputs)``.
        params: A pytree.
        inputs: The rest of the arguments.
        targets: What ``target_modules`` is.
        is_merged: Whether each weight is merged where it is used, for the net changes it first in a way of its own.
        left_out: What the warning of ``all-linear`` has to say; None if there must be none.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    targets: str | list[str] = "all-linear"
    is_merged: bool = False
    left_out: str | None = None


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)
