"""Rewrite a jaxpr some of whose variables are weights: each stands for the variables of its arrays.

Equations without a weight are kept as they are. One with a weight gives way to those that its rule traces to, and so do
several products of one input with weights, at the place of the first; of many like it one is traced.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from peft_jax.adapt import compat
from peft_jax.adapt.recorder import Recorder
from peft_jax.adapt.repeated_equations import with_calls
from peft_jax.adapt.shared_inputs import products_of_one_input
from peft_jax.adapt.view import Value, Watch, is_watched, rewatched

LEAF: Any = jax.tree.structure(0)
Atom = core.Var | core.Literal

# Equations on values of their operands, views of weights among them: of one all of its own; of several, which are
# products of one input, that input and the other operand of each.
Run = Callable[[Sequence[core.JaxprEqn], list[Value]], list[Value]]

Program = tuple[core.ClosedJaxpr, list[jax.tree_util.PyTreeDef]]  # with the structures of its outputs


class Stand(NamedTuple):
    """The atoms of a pytree of arrays that stand for one variable, and its structure."""

    atoms: tuple[Atom, ...]
    structure: jax.tree_util.PyTreeDef

    @property
    def watched(self) -> bool:
        """Whether it is a watched weight."""
        return is_watched(jax.tree.unflatten(self.structure, self.atoms))

    def with_watches(self, change: Callable[[Any], Any]) -> jax.tree_util.PyTreeDef:
        """The structure with other watches of its weights."""
        return _with_watches(self.structure, change)


class TracedEquations(NamedTuple):
    """The program of an equation, the recorders of its watches in their order, and the equation."""

    program: Program
    recorders: list[Recorder]
    eqn: core.JaxprEqn

    def of(self, eqn: core.JaxprEqn, watches: Iterable[Watch]) -> Program:
        """The program of an equation like it. Its watches get their reports, and go on watching its outputs."""
        if not self.recorders:
            return self.program
        program, structures = self.program
        ways = dict(zip((recorder.number for recorder in self.recorders), watches, strict=True))
        for recorder, watch in zip(self.recorders, watches, strict=True):
            recorder.report(watch, self.eqn, eqn)

        def following(recorder: Any) -> Watch:
            return recorder.replaced_by(ways[recorder.number], self.eqn, eqn)

        return program, [_with_watches(structure, following) for structure in structures]


class Renamed(NamedTuple):
    """A program in the variables of the one that it goes into."""

    eqns: list[core.JaxprEqn]
    outputs: list[Atom]
    consts: list[tuple[core.Var, jax.Array]]


def splice(
    jaxpr: core.ClosedJaxpr, args: Sequence[Value], run: Run
) -> tuple[core.ClosedJaxpr, list[jax.Array], jax.tree_util.PyTreeDef]:
    """The jaxpr with its equations on weights rewritten.

    Args:
        jaxpr: The program to run.
        args: Arrays, and views of weights.
        run: Runs an equation that has a view among its operands, or several together.

    Returns:
        A jaxpr of arrays alone, without constants; its inputs; the structure of its outputs, views among them.
    """
    stands: dict[core.Var, Stand] = {}  # for those variables that something else stands for
    inputs = list(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    for variable, arg in zip(jaxpr.jaxpr.invars, args, strict=True):
        leaves, structure = jax.tree.flatten(arg)
        if structure == LEAF and compat.is_number(arg):  # a literal of the equation that calls this program
            stands[variable] = Stand((core.Literal(arg, variable.aval),), LEAF)
        elif structure == LEAF:
            inputs.append((variable, arg))
        else:
            atoms = [core.Var(jax.typeof(leaf)) for leaf in leaves]
            stands[variable] = Stand(tuple(atoms), structure)
            inputs += zip(atoms, leaves, strict=True)

    pieces: list[list[core.JaxprEqn]] = [[]]
    traced: dict[Hashable, TracedEquations] = {}
    later_products = products_of_one_input(jaxpr.jaxpr.eqns)
    done_before = set[int]()
    for place, eqn in enumerate(jaxpr.jaxpr.eqns):
        if place in done_before:
            continue
        operands = [_stand(atom, stands) for atom in eqn.invars]
        if _all_arrays(operands):
            number = compat.folded(eqn, _atoms(operands))
            if number is None:
                pieces[-1].append(_with_operands(eqn, operands))
            else:
                stands[eqn.outvars[0]] = Stand((number,), LEAF)
            continue
        together = [eqn]
        for other in later_products.get(place, ()):
            weight = _stand(jaxpr.jaxpr.eqns[other].invars[1], stands)
            if (
                weight.structure != LEAF
                and operands[0].structure == LEAF
                and not (weight.watched or operands[1].watched)
            ):
                together.append(jaxpr.jaxpr.eqns[other])
                operands.append(weight)
                done_before.add(other)
        program, structures = _traced(together, operands, run, traced)
        new = _renamed(program, eqn, operands)
        pieces += [new.eqns, []]
        inputs += new.consts
        _note_outputs(together, new.outputs, structures, stands)

    results = [_stand(atom, stands) for atom in jaxpr.jaxpr.outvars]
    variables = [variable for variable, _ in inputs]
    if compat.is_traced() and not any(map(is_watched, args)):
        eqns = with_calls(pieces, _atoms(results), jaxpr)
    else:
        eqns = list(itertools.chain.from_iterable(pieces))
    program = compat.make_jaxpr(variables, _atoms(results), eqns, jaxpr)
    structure = jax.tree_util.treedef_tuple([result.structure for result in results])
    return program, [value for _, value in inputs], structure


def _with_watches(structure: jax.tree_util.PyTreeDef, change: Callable[[Any], Any]) -> jax.tree_util.PyTreeDef:
    """A structure with other watches of the weights in it."""
    if structure == LEAF:
        return structure
    value = jax.tree.unflatten(structure, range(structure.num_leaves))
    return jax.tree.structure(rewatched(value, change)) if is_watched(value) else structure


def _stand(atom: Atom, stands: Mapping[core.Var, Stand]) -> Stand:
    """The atoms that stand for an operand: itself, or the arrays of a weight."""
    own = Stand((atom,), LEAF)
    return own if compat.is_literal(atom) else stands.get(atom, own)


def _all_arrays(operands: Sequence[Stand]) -> bool:
    """Whether there is no weight among some operands."""
    return all(operand.structure == LEAF for operand in operands)


def _atoms(operands: Sequence[Stand]) -> list[Atom]:
    """The atoms of some operands, in order."""
    atoms: list[Atom] = []
    for operand in operands:
        atoms += operand.atoms
    return atoms


def _with_operands(eqn: core.JaxprEqn, operands: Sequence[Stand]) -> core.JaxprEqn:
    """An equation on arrays alone, with the atoms that stand for its operands."""
    atoms = _atoms(operands)
    return eqn if atoms == eqn.invars else eqn.replace(invars=atoms)


def _note_outputs(
    eqns: Sequence[core.JaxprEqn],
    outputs: Sequence[Atom],
    structures: Sequence[jax.tree_util.PyTreeDef],
    stands: dict[core.Var, Stand],
) -> None:
    """Enter the atoms that stand for the outputs of equations: each takes as many as its structure has leaves."""
    rest = list(outputs)
    structure_of_next = iter(structures)
    for eqn in eqns:
        for variable in eqn.outvars:
            structure = next(structure_of_next)
            stands[variable] = Stand(tuple(rest[: structure.num_leaves]), structure)
            del rest[: structure.num_leaves]


def _traced(
    eqns: Sequence[core.JaxprEqn], operands: Sequence[Stand], run: Run, traced: dict[Hashable, TracedEquations]
) -> Program:
    """Trace equations on weights, or find the program of equations like them; watches get their reports of both."""
    eqn, atoms = eqns[0], _atoms(operands)
    literals: list[tuple[int, Any]] = []
    known: list[tuple[int, bytes]] = []
    for i, atom in enumerate(atoms):
        if compat.is_literal(atom):
            literals.append((i, atom.val))
            known.append((i, compat.literal_key(atom)))
    types = tuple(atom.aval for atom in atoms)
    watches: dict[Watch, int] = {}
    structures = tuple(
        operand.with_watches(lambda watch: watches.setdefault(watch, len(watches))) for operand in operands
    )
    key: Hashable = (eqn.primitive, tuple(eqn.params.items()), eqn.ctx, tuple(known), types, structures)
    if not compat.is_hashable(key):
        key = (eqn,)
    if key not in traced:
        recorders = [Recorder() for _ in watches]
        recorded = [operand.with_watches(lambda watch: recorders[watches[watch]]) for operand in operands]
        traced[key] = TracedEquations(_trace(eqns, types, literals, recorded, run), recorders, eqn)
    return traced[key].of(eqn, watches)


def _trace(
    eqns: Sequence[core.JaxprEqn],
    types: Sequence[Any],
    literals: Sequence[tuple[int, Any]],
    structures: Sequence[jax.tree_util.PyTreeDef],
    run: Run,
) -> Program:
    """Trace equations on values of these types; of the literals the numbers are known."""
    structure = jax.tree_util.treedef_tuple(structures)
    unknown = list(types)
    for i, _ in reversed(literals):
        del unknown[i]

    def rule(arrays: list[jax.Array]) -> list[Value]:
        leaves: list[Any] = list(arrays)
        for i, number in literals:
            leaves.insert(i, number)
        return run(eqns, list(jax.tree.unflatten(structure, leaves)))

    program, shapes = jax.make_jaxpr(rule, return_shape=True)(unknown)
    return program, [jax.tree.structure(shape) for shape in shapes]


def _renamed(program: core.ClosedJaxpr, eqn: core.JaxprEqn, operands: Sequence[Stand]) -> Renamed:
    """A program in the variables of the operands and in new ones, as written where ``eqn`` is."""
    variables = [atom for atom in _atoms(operands) if not compat.is_literal(atom)]
    names: dict[core.Var, Atom] = dict(zip(program.jaxpr.invars, variables, strict=True))
    consts = []
    for old, value in zip(program.jaxpr.constvars, program.consts, strict=True):
        names[old] = new = core.Var(old.aval)
        consts.append((new, value))

    def renamed(atoms: Sequence[Atom]) -> list[Atom]:
        return [atom if compat.is_literal(atom) else names[atom] for atom in atoms]

    eqns = []
    for inner in program.jaxpr.eqns:
        for old in inner.outvars:
            names[old] = core.Var(old.aval)
        invars, outvars = renamed(inner.invars), renamed(inner.outvars)
        eqns.append(inner.replace(invars=invars, outvars=outvars, source_info=eqn.source_info))
    return Renamed(eqns, renamed(program.jaxpr.outvars), consts)
