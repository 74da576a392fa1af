"""Rewrite a jaxpr some of whose variables are weights: each stands for the variables of its arrays.

Equations without a weight are kept as they are. One with a weight gives way to those that its rule traces to, and so do
several products of one input with weights, at the place of the first; of many like it one is traced.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from peft_jax.adapt import compat
from peft_jax.adapt.shared_inputs import products_of_one_input
from peft_jax.adapt.view import is_view

LEAF: Any = jax.tree.structure(0)

# Equations on values of their operands, views of weights among them: of one all of its own; of several, which are
# products of one input, that input and the other operand of each.
Run = Callable[[Sequence[Any], list[Any]], list[Any]]


class Stand(NamedTuple):
    """What stands for a variable: the atoms of a pytree of arrays, and its structure."""

    atoms: tuple[Any, ...]
    structure: Any

    @property
    def watched(self) -> bool:
        """Whether it is a weight that somebody watches, who wants to see every equation."""
        value = jax.tree.unflatten(self.structure, self.atoms)
        return is_view(value) and value.watch is not None


def splice(jaxpr: core.ClosedJaxpr, args: Sequence[Any], run: Run) -> tuple[core.ClosedJaxpr, list[Any], Any]:
    """The jaxpr with its equations on weights rewritten.

    Args:
        jaxpr: What is to be run.
        args: Arrays, and views of weights.
        run: What an equation does that has a view among its operands, or several together.

    Returns:
        A jaxpr of arrays alone, without constants; its inputs; the structure of its outputs, views among them.
    """
    stands: dict[Any, Stand] = {}  # for those variables that something else stands for
    inputs = list(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    for variable, arg in zip(jaxpr.jaxpr.invars, args, strict=True):
        leaves, structure = jax.tree.flatten(arg)
        if structure == LEAF:
            inputs.append((variable, arg))
        else:
            atoms = [core.Var(jax.typeof(leaf)) for leaf in leaves]
            stands[variable] = Stand(tuple(atoms), structure)
            inputs += zip(atoms, leaves, strict=True)

    eqns, traced = [], dict[Any, Any]()
    mates, gone = products_of_one_input(jaxpr.jaxpr.eqns), set[int]()
    for place, eqn in enumerate(jaxpr.jaxpr.eqns):
        if place in gone:
            continue
        operands = [_stand(atom, stands) for atom in eqn.invars]
        if all(operand.structure == LEAF for operand in operands):
            atoms = [atom for operand in operands for atom in operand.atoms]
            eqns.append(eqn if atoms == eqn.invars else eqn.replace(invars=atoms))
            continue
        same = [eqn]
        for other in mates.get(place, ()):
            weight = stands.get(jaxpr.jaxpr.eqns[other].invars[1])
            if weight is not None and operands[0].structure == LEAF and not (weight.watched or operands[1].watched):
                same.append(jaxpr.jaxpr.eqns[other])
                operands.append(weight)
                gone.add(other)
        program, structures = _traced(same, operands, run, traced)
        new, outputs, consts = _renamed(program, eqn, operands)
        eqns += new
        inputs += consts
        outvars = [variable for one in same for variable in one.outvars]
        for variable, structure in zip(outvars, structures, strict=True):
            stands[variable] = Stand(tuple(outputs[: structure.num_leaves]), structure)
            del outputs[: structure.num_leaves]

    results = [_stand(atom, stands) for atom in jaxpr.jaxpr.outvars]
    outvars = [atom for result in results for atom in result.atoms]
    program = compat.make_jaxpr([variable for variable, _ in inputs], outvars, eqns, jaxpr)
    return program, [value for _, value in inputs], jax.tree_util.treedef_tuple([r.structure for r in results])


def _stand(atom: Any, stands: Mapping[Any, Stand]) -> Stand:
    own = Stand((atom,), LEAF)
    return own if compat.is_literal(atom) else stands.get(atom, own)


def _traced(eqns: Sequence[Any], operands: Sequence[Stand], run: Run, traced: dict[Any, Any]) -> tuple[Any, list[Any]]:
    """What equations on weights trace to, and the structures of their outputs."""
    eqn = eqns[0]
    atoms = [atom for operand in operands for atom in operand.atoms]
    literals = tuple((i, atom.val) for i, atom in enumerate(atoms) if compat.is_literal(atom))
    structures = tuple(operand.structure for operand in operands)
    key = (eqn.primitive, tuple(eqn.params.items()), eqn.ctx, literals, tuple(atom.aval for atom in atoms), structures)
    if compat.is_hashable(key) and not any(operand.watched for operand in operands):
        if key not in traced:
            traced[key] = _trace(eqns, atoms, literals, structures, run)
        return traced[key]
    return _trace(eqns, atoms, literals, structures, run)


def _trace(
    eqns: Sequence[Any], atoms: Sequence[Any], literals: Sequence[tuple[int, Any]], structures: Sequence[Any], run: Run
) -> tuple[Any, list[Any]]:
    known = dict(literals)

    def rule(arrays: list[Any]) -> list[Any]:
        rest = iter(arrays)
        leaves = [known[i] if i in known else next(rest) for i in range(len(atoms))]
        return run(eqns, list(jax.tree.unflatten(jax.tree_util.treedef_tuple(structures), leaves)))

    types = [atom.aval for i, atom in enumerate(atoms) if i not in known]
    program, shapes = jax.make_jaxpr(rule, return_shape=True)(types)
    return program, [jax.tree.structure(shape) for shape in shapes]


def _renamed(program: Any, eqn: Any, operands: Sequence[Stand]) -> tuple[list[Any], list[Any], list[tuple[Any, Any]]]:
    """Equations and outputs of a program, in the variables of the operands and in new ones; its constants, likewise."""
    atoms = (atom for operand in operands for atom in operand.atoms if not compat.is_literal(atom))
    names = dict(zip(program.jaxpr.invars, atoms, strict=True))
    consts = [(core.Var(old.aval), value) for old, value in zip(program.jaxpr.constvars, program.consts, strict=True)]
    names |= zip(program.jaxpr.constvars, (new for new, _ in consts), strict=True)

    def renamed(atoms: Sequence[Any]) -> list[Any]:
        return [atom if compat.is_literal(atom) else names[atom] for atom in atoms]

    eqns = []
    for inner in program.jaxpr.eqns:
        names |= ((old, core.Var(old.aval)) for old in inner.outvars)
        invars, outvars = renamed(inner.invars), renamed(inner.outvars)
        eqns.append(inner.replace(invars=invars, outvars=outvars, source_info=eqn.source_info))
    return eqns, renamed(program.jaxpr.outvars), consts
