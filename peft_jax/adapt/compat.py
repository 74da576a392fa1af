"""All that differs between the JAX versions we support (0.10 to 0.12), and all we read of a jaxpr's insides."""

from typing import Any, NamedTuple

import jax
from jax.extend import core


class Scan(NamedTuple):
    """A scan equation, version by version the same."""

    body: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(eqn: core.JaxprEqn) -> Scan:
    """The parts of a scan equation."""
    p = eqn.params
    if "ft_in" in p:  # jax >= 0.11
        num_consts, num_carry, _ = (len(list(part.vals)) for part in p["ft_in"].unpack())
    else:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    return Scan(p["jaxpr"], num_consts, num_carry, p["length"], p["reverse"], p["unroll"])


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A jaxpr that an equation holds, with its constants (checkpoint's has none and is stored bare)."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Run one equation as it stands."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def is_literal(atom: Any) -> bool:
    """Whether an operand is a literal, which holds its value."""
    return isinstance(atom, core.Literal)


def is_array(value: Any) -> bool:
    """Whether a leaf of a function's arguments is traced as an array."""
    return isinstance(value, jax.Array) or (hasattr(value, "shape") and hasattr(value, "dtype"))
