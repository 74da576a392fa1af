"""Which leaf is the bias of which matrix: a program adds it to the result of the product with the matrix."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.notes import Program, notes_of_outputs

MOVES = (
    "broadcast_in_dim convert_element_type copy dynamic_slice name optimization_barrier pcast pvary reshape "
    "sharding_constraint slice squeeze stop_gradient transpose untrained_row"
).split()
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "closed_call": "call_jaxpr"}


class Origin(NamedTuple):
    """The leaf that a variable is, or the leaf that it is the result of a product with."""

    path: str
    is_result: bool


Origins = Sequence[Origin | None]


def read_biases(jaxpr: ClosedJaxpr, paths: Sequence[str | None]) -> dict[str, str]:
    """The path of the matrix by that of its bias.

    A leaf that is added to products with several matrices, as in a recurrent cell, is the bias of none of them.

    Args:
        jaxpr: The program.
        paths: For each of its inputs the path of the leaf, or None.
    """
    inputs = [None if path is None else Origin(path, is_result=False) for path in paths]
    found: dict[str, set[str]] = {}
    _walk(jaxpr, inputs, found)
    biases = {}
    for bias, matrices in found.items():
        if len(matrices) == 1:
            (biases[bias],) = matrices
    return biases


def _walk(program: Program, inputs: Origins, found: dict[str, set[str]]) -> Origins:
    """The origins of the outputs; biases are put into ``found``."""
    return notes_of_outputs(program, inputs, lambda eqn, operands: _results(eqn, operands, found))


def _results(eqn: JaxprEqn, operands: Origins, found: dict[str, set[str]]) -> Origins:
    """The origins of an equation's outputs; fewer than there are if the others have none."""
    kind = eqn.primitive.name
    leaves: list[Origin] = []
    results: list[Origin] = []
    for origin in operands:
        if origin is not None:
            (results if origin.is_result else leaves).append(origin)
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


def _bodies(eqn: JaxprEqn, operands: Origins) -> Iterator[tuple[Program, Origins]]:
    """Programs that an equation runs in a loop, by choice or by device, with the origins of their inputs."""
    kind, params = eqn.primitive.name, eqn.params
    if kind == "scan":
        parts = compat.scan_parts(eqn)
        end = parts.num_consts + parts.num_carry
        yield parts.body, [*operands[: parts.num_consts], *[None] * parts.num_carry, *operands[end:]]
    elif kind == "while":
        start = params["cond_nconsts"]
        end = start + params["body_nconsts"]
        yield params["body_jaxpr"], [*operands[start:end], *[None] * (len(operands) - end)]
    elif kind == "cond":
        for branch in params["branches"]:
            yield branch, operands[1:]
    elif kind == "shard_map":
        yield compat.shard_map_parts(eqn).body, operands
