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
        left_out: What the warning of ``all-linear`` has to say; None if there must be none.
        merged: Ends of the paths of leaves that are merged somewhere, which `peft_jax.explain` says.
        wide: Ends of the paths of leaves that stay wide in int8, as convolutions may.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    left_out: str | None = None
    merged: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)
