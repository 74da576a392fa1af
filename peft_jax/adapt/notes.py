"""Notes on the variables of a program, such as the leaf that one comes from, handed on from equation to equation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from peft_jax.adapt import compat

N = TypeVar("N")
Program = Jaxpr | ClosedJaxpr
Results = Callable[[JaxprEqn, list[N | None]], Iterable[N | None]]


def notes_of_outputs(program: Program, inputs: Iterable[N | None], results: Results[N]) -> list[N | None]:
    """The notes of a program's outputs; None where there is none.

    Args:
        program: The program.
        inputs: The notes of its inputs. There may be fewer than inputs if the others have none.
        results: Gives the notes of an equation's outputs, fewer likewise, from those of its operands. It is called for
            equations of which an operand has one.
    """
    jaxpr = compat.closed(program).jaxpr
    known: dict[Var, N] = {}
    _note(jaxpr.invars, inputs, known)
    for eqn in jaxpr.eqns:
        operands = _notes_of(eqn.invars, known)
        if any(operand is not None for operand in operands):
            _note(eqn.outvars, results(eqn, operands), known)
    return _notes_of(jaxpr.outvars, known)


def _note(variables: Sequence[Var], notes: Iterable[N | None], known: dict[Var, N]) -> None:
    for variable, note in zip(variables, notes, strict=False):
        if note is not None:
            known[variable] = note


def _notes_of(atoms: Sequence[Var | Literal], known: Mapping[Var, N]) -> list[N | None]:
    return [None if compat.is_literal(atom) else known.get(atom) for atom in atoms]
