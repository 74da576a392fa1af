"""Which leaf is the bias of which matrix: what a program adds to the result of the product with the matrix."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from peft_jax.adapt import compat

MOVES = (
    "broadcast_in_dim convert_element_type copy dynamic_slice name optimization_barrier pcast pvary reshape "
    "sharding_constraint slice squeeze stop_gradient transpose"
).split()
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "closed_call": "call_jaxpr"}


class Origin(NamedTuple):
    """What a variable is: a leaf, or the result of a product with it."""

    path: str
    is_result: bool


Origins = Sequence[Origin | None]


def read_biases(jaxpr: Any, paths: Sequence[str | None]) -> dict[str, str]:
    """The path of the matrix by that of its bias.

    A leaf that is added to products with several matrices, as in a recurrent cell, is the bias of none of them.

    Args:
        jaxpr: A closed jaxpr.
        paths: Of each of its inputs the path of the leaf, or None.
    """
    found: dict[str, set[str]] = {}
    _walk(jaxpr, [path and Origin(path, is_result=False) or None for path in paths], found)
    return {bias: next(iter(matrices)) for bias, matrices in found.items() if len(matrices) == 1}


def _walk(jaxpr: Any, inputs: Origins, found: dict[str, set[str]]) -> list[Origin | None]:
    """The origins of the outputs; biases are put into ``found``."""
    jaxpr = compat.closed(jaxpr).jaxpr
    known = {variable: origin for variable, origin in zip(jaxpr.invars, inputs, strict=True) if origin is not None}

    def origins(atoms: Sequence[Any]) -> list[Origin | None]:
        return [None if compat.is_literal(atom) else known.get(atom) for atom in atoms]

    for eqn in jaxpr.eqns:
        operands = origins(eqn.invars)
        if any(origin is not None for origin in operands):
            results = _results(eqn, operands, found)
            known |= {out: origin for out, origin in zip(eqn.outvars, results, strict=False) if origin is not None}
    return origins(jaxpr.outvars)


def _results(eqn: Any, operands: Origins, found: dict[str, set[str]]) -> Origins:
    """The origins of an equation's outputs; fewer than there are if the others have none."""
    kind = eqn.primitive.name
    leaves = [origin for origin in operands if origin is not None and not origin.is_result]
    results = [origin for origin in operands if origin is not None and origin.is_result]
    if kind in MOVES:
        return operands
    if kind in PRODUCTS and len(leaves) == 1:
        return [Origin(leaves[0].path, is_result=True)]
    if kind == "add" and len(results) == 1:
        for leaf in leaves:
            found.setdefault(leaf.path, set()).add(results[0].path)
        return [] if leaves else results  # the sum with anything else, as a residual, may get its bias later
    if kind in CALLS:
        return _walk(eqn.params[CALLS[kind]], operands, found)
    for inner, inputs in _bodies(eqn, operands):
        _walk(inner, inputs, found)
    return []


def _bodies(eqn: Any, operands: Origins) -> Iterator[tuple[Any, Origins]]:
    """Programs that an equation runs in a loop, by choice or by device, with the origins of their inputs."""
    kind, p = eqn.primitive.name, eqn.params
    if kind == "scan":
        parts = compat.scan_parts(eqn)
        carried = range(parts.num_consts, parts.num_consts + parts.num_carry)
        yield parts.body, [None if i in carried else origin for i, origin in enumerate(operands)]
    elif kind == "while":
        consts = operands[p["cond_nconsts"] :][: p["body_nconsts"]]
        yield p["body_jaxpr"], [*consts, *[None] * (len(operands) - p["cond_nconsts"] - p["body_nconsts"])]
    elif kind == "cond":
        for branch in p["branches"]:
            yield branch, operands[1:]
    elif kind == "shard_map":
        yield compat.shard_map_parts(eqn).body, operands
