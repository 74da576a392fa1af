"""Equations that come again in a program, as those of each layer do, become calls of one program.

JAX caches the derivative of a called program and uses it again at the next call. It differentiates equations outside
calls one by one, which for many layers takes longer than tracing the model.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jax.extend import core

from peft_jax.adapt import compat

Atom = core.Var | core.Literal
Equations = list[core.JaxprEqn]


class Part(NamedTuple):
    """Equations that follow each other, with a number for each; equal numbers stand for one operation."""

    eqns: Equations
    numbers: list[int]


class Interface(NamedTuple):
    """The variables that a part takes from the rest of a program, and those that it makes for it."""

    taken: list[core.Var]
    made: list[core.Var]


def with_calls(pieces: Sequence[Equations], outputs: Sequence[Atom], program: core.ClosedJaxpr) -> Equations:
    """A program's equations, with a call in place of each part that is there more than once.

    Args:
        pieces: The equations, cut where a part may begin.
        outputs: The outputs of the program.
        program: The program that these equations come from.
    """
    parts = _parts(pieces)
    interfaces = _interfaces(parts, outputs)
    keys = [_key(part, interface) for part, interface in zip(parts, interfaces, strict=True)]
    count = Counter(keys)
    calls: dict[Hashable, core.JaxprEqn] = {}
    eqns: Equations = []
    for part, interface, key in zip(parts, interfaces, keys, strict=True):
        is_call = len(part.eqns) == 1 and part.eqns[0].primitive.name in compat.JITS
        if count[key] == 1 or is_call:
            eqns += part.eqns
            continue
        if key not in calls:
            calls[key] = compat.call(compat.program_of(part.eqns, *interface, program), "repeated")
        taken, made = interface
        eqns.append(calls[key].replace(invars=list(taken), outvars=made, source_info=part.eqns[0].source_info))
    return eqns


def _parts(pieces: Sequence[Equations]) -> list[Part]:
    """The pieces' equations in parts.

    An equation that occurs once, or has effects, is a part by itself. Other equations that follow each other and have
    the same name stack are one part, since a call has one name stack.
    """
    every: list[int] = []
    known: dict[Hashable, int] = {}
    for piece in pieces:
        for eqn in piece:
            every.append(_number(eqn, known))
    count = Counter(every)
    numbers = iter(every)
    parts: list[Part] = []
    for piece in pieces:
        name_before = None
        for eqn in piece:
            number = next(numbers)
            name = None if count[number] == 1 else eqn.source_info.name_stack
            if name is None or name != name_before:
                parts.append(Part([], []))
            parts[-1].eqns.append(eqn)
            parts[-1].numbers.append(number)
            name_before = name
    return parts


def _number(eqn: core.JaxprEqn, known: dict[Hashable, int]) -> int:
    """The number of what an equation does to its operands; a new one if there is nothing like it."""
    operands = []
    for atom in eqn.invars:
        operands.append((atom.aval, compat.literal_key(atom) if compat.is_literal(atom) else None))
    results = tuple(variable.aval for variable in eqn.outvars)
    key: Hashable = (eqn.primitive, tuple(eqn.params.items()), eqn.ctx, tuple(operands), results)
    if eqn.effects or not compat.is_hashable(key):
        key = (eqn,)
    return known.setdefault(key, len(known))


def _interfaces(parts: Sequence[Part], outputs: Sequence[Atom]) -> list[Interface]:
    """For each part what it takes, and what of its results is used after it."""
    used = {atom for atom in outputs if not compat.is_literal(atom)}
    interfaces: list[Interface] = []
    for part in reversed(parts):
        own: dict[core.Var, None] = {}
        taken: dict[core.Var, None] = {}
        for eqn in part.eqns:
            for atom in eqn.invars:
                if not compat.is_literal(atom) and atom not in own:
                    taken[atom] = None
            own |= dict.fromkeys(eqn.outvars)
        interfaces.append(Interface(list(taken), [variable for variable in own if variable in used]))
        used.difference_update(own)
        used.update(taken)
    return interfaces[::-1]


def _key(part: Part, interface: Interface) -> Hashable:
    """A key that parts have in common which compute the same from what they take."""
    places: dict[core.Var, int] = {}
    for variable in interface.taken:
        places[variable] = len(places)
    operands: list[int | None] = []
    for eqn in part.eqns:
        for atom in eqn.invars:
            operands.append(None if compat.is_literal(atom) else places[atom])
        for variable in eqn.outvars:
            places[variable] = len(places)
    made = [places[variable] for variable in interface.made]
    return tuple(part.numbers), tuple(operands), tuple(made)
