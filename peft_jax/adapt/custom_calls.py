"""Calls of functions whose derivative somebody wrote: ``jax.custom_jvp`` and ``jax.custom_vjp``.

Side paths are differentiated as JAX does it. So a weight goes inside of such a call only where the derivative that was
written is the one that JAX finds for the body, as of a function that passes a weight on, scaled or moved.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, jaxpr_as_fun

from peft_jax.adapt import compat
from peft_jax.core.selecting import picked

CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call")


def has_derivative_of_body(eqn: JaxprEqn) -> bool:
    """Whether the derivative that was written for a call is the program that JAX makes of the call's body."""

    def called(*operands: jax.Array) -> list[jax.Array]:
        return compat.bind(eqn, list(operands))

    types = [compat.type_of(atom) for atom in eqn.invars]
    own = _gradient_program(jaxpr_as_fun(eqn.params["call_jaxpr"]), types)
    return own is not None and own == _gradient_program(called, types)


def _gradient_program(fn: Callable[..., Any], types: Sequence[Any]) -> str | None:
    """The program of a function's gradients with respect to all operands, as text; None if there is none to compare."""
    places = [place for place, kind in enumerate(types) if jnp.issubdtype(kind.dtype, jnp.inexact)]
    outs = jax.eval_shape(fn, *types)
    is_float = [bool(jnp.issubdtype(out.dtype, jnp.inexact)) for out in outs]

    def gradients(operands: list[jax.Array], given: list[jax.Array]) -> tuple[jax.Array, ...]:
        def of_floats(*floats: jax.Array) -> Any:
            own = list(operands)
            for place, value in zip(places, floats, strict=True):
                own[place] = value
            return fn(*own)

        found, pull_back = jax.vjp(of_floats, *picked(operands, places))
        cotangents = []
        for out, cotangent, is_given in zip(found, given, is_float, strict=True):
            cotangents.append(cotangent if is_given else np.zeros(out.shape, jax.dtypes.float0))
        pulled: tuple[jax.Array, ...] = pull_back(type(found)(cotangents))
        return pulled

    try:
        program = jax.make_jaxpr(gradients)(list(types), outs)
    except Exception:  # a function that somebody wrote; what cannot be traced is not the derivative of the body
        return None
    return None if program.consts else str(compat.without_dead_code(program))
