"""Weights of a program that are not seen to be weights, for they reach their product through what is not followed.

The program is walked through with a note for each variable: which leaves it is made of, as long as it is made of
leaves and constants alone. What depends on the inputs, activations, has no such note. A leaf in one operand of a
product is one of its weights.

Not seen are a weight that is changed by an array of the inputs, for which a gain or a table of positions would look
the same; one that is broadcast before it is changed; and one that is multiplied by another weight that is followed, as
``w1`` in ``x @ (0.5 * w1 @ w2)``, which looks like a learned input of that product.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from peft_jax.adapt import compat
from peft_jax.adapt.custom_calls import CUSTOM_CALLS
from peft_jax.adapt.infer_layouts import Reading
from peft_jax.adapt.rules import CALLS, RULES

PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
KERNELS = ("pallas_call", "ffi_call")  # opaque: a matrix that meets activations there may be multiplied
MOVES = set(RULES) - {
    *PRODUCTS,
    *CALLS,
    "gather",
    "add",
    "sub",
    "mul",
    "div",
    "stack",
    "concatenate",
    "pad",
    "reduce_sum",
}
ONE_BY_ONE = ("optimization_barrier", "device_put")  # each output is the operand in its place


class Loss(NamedTuple):
    """The equation at which a leaf is no longer followed."""

    primitive: str
    where: str

    def __str__(self) -> str:
        return f"{self.primitive} at {self.where}"


class Part(NamedTuple):
    """A leaf in a variable: how many axes of it are left, whether it is broadcast, where it was no longer followed."""

    ndim: int
    spread: bool = False
    loss: Loss | None = None


Note = dict[str, Part] | None  # the leaves that a variable is made of, by path; None if it depends on the inputs
Program = Jaxpr | ClosedJaxpr


def left_out(reading: Reading, paths: Collection[str]) -> dict[str, Loss]:
    """Find leaves that a program multiplies by unseen, and where they are no longer followed.

    Args:
        reading: The program, as `peft_jax.adapt.infer_layouts.read_program` has read it.
        paths: Paths of the leaves to look for.

    Example:
        >>> import jax.numpy as jnp
        >>> from peft_jax.adapt.infer_layouts import read_program
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "gain": jnp.ones(8)}}
        >>> def model(params, x):
        ...     return params["up"]["gain"] * (x @ jnp.tanh(params["up"]["kernel"]))
        >>> found = left_out(read_program(params, model, (jnp.ones((1, 4)),)).reading, ["up.kernel", "up.gain"])
        >>> {path: loss.primitive for path, loss in found.items()}
        {'up.kernel': 'tanh'}
    """
    if not paths:
        return {}
    notes: list[Note] = []
    for path, variable in zip(reading.paths, reading.jaxpr.jaxpr.invars, strict=True):
        notes.append(None if path is None else {path: Part(compat.type_of(variable).ndim)})
    walk = _Walk(reading.merges, {})
    walk.program(reading.jaxpr, notes, None)
    return {path: loss for path, loss in walk.found.items() if path in paths}


def report(what: str, losses: Mapping[str, Loss], way_out: str, *, alone: bool, stacklevel: int) -> None:
    """Warn of weights that are left out.

    Args:
        what: What leaves them out.
        losses: As from `left_out`.
        way_out: What to write instead.
        alone: Whether nothing else is left.
        stacklevel: As of ``warnings.warn``, from here.

    Raises:
        ValueError: in place of the warning, if nothing else is left.
    """
    if not losses:
        return
    named = ", ".join(f"'{path}' ({loss})" for path, loss in sorted(losses.items()))
    why = f"each reaches its product through what is not followed. {named}. {way_out}"
    if alone:
        raise ValueError(f"{what} leaves out every weight, {len(losses)} in all: {why}")
    warnings.warn(f"{what} leaves out weights, {len(losses)} in all: {why}", stacklevel=stacklevel + 1)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A walk through programs; ``found`` collects the leaves that they multiply by, ``merges`` is of the `Reading`."""

    merges: Mapping[str, Collection[int]]
    found: dict[str, Loss]

    def program(self, program: Program, notes: Sequence[Note], place: str | None) -> list[Note]:
        """Notes of a program's outputs, given those of its inputs and where it was called."""
        jaxpr = compat.closed(program).jaxpr
        known: dict[Var, Note] = dict(zip(jaxpr.invars, notes, strict=True))
        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, _of_operands(eqn.invars, known), place)
            for variable, out in zip(eqn.outvars, outs, strict=True):
                is_scalar = getattr(variable.aval, "ndim", 0) == 0
                known[variable] = {} if out is None and is_scalar else out  # a weight times a number is still a weight
        return _of_operands(jaxpr.outvars, known)

    def equation(self, eqn: JaxprEqn, notes: list[Note], place: str | None) -> list[Note]:
        """Notes of an equation's outputs."""
        name, place = eqn.primitive.name, compat.where(eqn) or place
        loss = Loss(name, place or "a place inside a library")
        inner = _inner(eqn)
        if name in CALLS:
            return self.call(eqn, [self.merged(eqn, note, loss) for note in notes], loss, place)
        if name in PRODUCTS and not compat.is_elementwise(eqn):
            self.product(notes[:2], loss)
            return [_without_leaves(notes)]
        if name in KERNELS:
            if None in notes:
                self.product([_joined(notes, skip_inputs=True), None], loss)
            return [_without_leaves(notes)] * len(eqn.outvars)
        if inner is not None:
            return _all_lost(self.program(inner, _all_lost(notes, loss), place), loss)
        if name in ONE_BY_ONE:
            return notes if name in MOVES else _all_lost(notes, loss)
        if self.is_followed(eqn, notes):
            return _moved(eqn, _joined(notes, skip_inputs=True))
        if name in ("dynamic_slice", "gather"):
            notes = notes[:1]
        shapes = [getattr(variable.aval, "shape", ()) for variable in eqn.outvars]
        if shapes:
            notes = [_own(eqn, i, note, shapes[0]) for i, note in enumerate(notes)]
        joined = _lost(_joined(notes), loss)
        return [_with_axes(joined, len(shape)) for shape in shapes]

    def merged(self, eqn: JaxprEqn, note: Note, loss: Loss) -> Note:
        """The note of an operand with those leaves lost that a call could not take as they are."""
        lost = {path for path in note or () if id(eqn) in self.merges.get(path, ())}
        return note and {
            path: part._replace(loss=part.loss or loss) if path in lost else part for path, part in note.items()
        }

    def is_followed(self, eqn: JaxprEqn, notes: Sequence[Note]) -> bool:
        """Whether an equation moves its leaves, those that were followed up to here, to another view of them."""
        leaves = [(path, part) for note in notes for path, part in (note or {}).items()]
        kept = [path for path, part in leaves if part.loss is None]
        if not kept:
            return bool(leaves) and eqn.primitive.name in MOVES
        for path in kept:
            is_lost = id(eqn) in self.merges[path] if path in self.merges else eqn.primitive.name not in MOVES
            if is_lost:
                return False
        return True

    def product(self, notes: Sequence[Note], loss: Loss) -> None:
        """Record the weights of a product of two operands.

        A leaf that was followed up to here is a weight. If it meets another leaf that was not followed, that one is
        its input, as learned queries are, which are normalised first.
        """
        left, right = notes
        for note, other in ((left or {}, right or {}), (right or {}, left or {})):
            meets_weight = any(part.loss is None and part.ndim > 1 for part in other.values())
            for path, part in note.items():
                if part.ndim > 1 and not (part.loss and meets_weight):
                    self.found.setdefault(path, part.loss or loss)

    def call(self, eqn: JaxprEqn, notes: list[Note], loss: Loss, place: str | None) -> list[Note]:
        """Notes of the outputs of a call or a loop."""
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            parts = compat.scan_parts(eqn)
            end = parts.num_consts + parts.num_carry
            sliced = []
            for note, atom in zip(notes[end:], eqn.invars[end:], strict=True):
                sliced.append(_with_axes(note, compat.type_of(atom).ndim - 1))

            def step(walk: "_Walk", carry: list[Note]) -> list[Note]:
                return walk.program(parts.body, [*notes[: parts.num_consts], *carry, *sliced], place)

            return self.loop(step, notes[parts.num_consts : end], loss)
        if name == "while":
            cond, body = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]

            def turn(walk: "_Walk", carry: list[Note]) -> list[Note]:
                walk.program(p["cond_jaxpr"], [*notes[:cond], *carry], place)
                return walk.program(p["body_jaxpr"], [*notes[cond:body], *carry], place)

            return self.loop(turn, notes[body:], loss)
        if name == "cond":
            branches = [self.program(branch, notes[1:], place) for branch in p["branches"]]
            return [_lost(_joined(outs), loss) for outs in zip(*branches, strict=True)]
        if name == "shard_map":
            return _all_lost(self.program(compat.shard_map_parts(eqn).body, notes, place), loss)
        return self.program(p["call_jaxpr" if name in CUSTOM_CALLS else "jaxpr"], notes, place)

    def loop(self, step: Callable[["_Walk", list[Note]], list[Note]], carry: list[Note], loss: Loss) -> list[Note]:
        """Notes of a loop's outputs; its body is walked through until the notes of the carried values stay the same."""
        carry = _all_lost(carry, loss)
        while True:
            outs = step(_Walk(self.merges, {}), carry)
            joined = [_joined(pair) for pair in zip(carry, outs[: len(carry)], strict=True)]
            following = _all_lost(joined, loss)
            if following == carry:
                break
            carry = following
        return _all_lost([*carry, *step(self, carry)[len(carry) :]], loss)


def _of_operands(atoms: Sequence[Var | Literal], known: Mapping[Var, Note]) -> list[Note]:
    """The notes of operands."""
    return [{} if compat.is_literal(atom) else known.get(atom, {}) for atom in atoms]


def _without_leaves(notes: Sequence[Note]) -> Note:
    """The note of a result whose leaves are not followed: None if any operand depends on the inputs."""
    return None if None in notes else {}


def _joined(notes: Sequence[Note], *, skip_inputs: bool = False) -> Note:
    """The note of a variable that is made of several others."""
    joined: dict[str, Part] = {}
    for note in notes:
        if note is None and not skip_inputs:
            return None
        for path, part in (note or {}).items():
            old = joined.get(path, part)
            joined[path] = Part(max(old.ndim, part.ndim), old.spread and part.spread, old.loss or part.loss)
    return joined


def _lost(note: Note, loss: Loss) -> Note:
    """The note with the place where its leaves are no longer followed, for those that were."""
    return note and {path: part._replace(loss=part.loss or loss) for path, part in note.items()}


def _all_lost(notes: Sequence[Note], loss: Loss) -> list[Note]:
    return [_lost(note, loss) for note in notes]


def _with_axes(note: Note, ndim: int) -> Note:
    """The note where at most ``ndim`` axes are left."""
    return note and {path: part._replace(ndim=min(part.ndim, ndim)) for path, part in note.items()}


def _own(eqn: JaxprEqn, operand: int, note: Note, shape: Sequence[int]) -> Note:
    """The leaves of an operand without those that are broadcast, such as a gain: they are no matrices."""
    if note is None:
        return None
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
    is_update = eqn.primitive.name.startswith(("scatter", "dynamic_update_slice"))
    if shapes[operand] != tuple(shape) and tuple(shape) in shapes and not is_update:
        return {}
    return {path: part for path, part in note.items() if not part.spread}


def _moved(eqn: JaxprEqn, note: Note) -> list[Note]:
    """The notes of the results of a move."""
    old = compat.type_of(eqn.invars[0])
    notes = []
    for variable in eqn.outvars:
        new = compat.type_of(variable)
        if math.prod(new.shape) > math.prod(old.shape) and eqn.primitive.name == "broadcast_in_dim":
            notes.append(note and {path: part._replace(spread=True) for path, part in note.items()})
        elif eqn.primitive.name == "reshape" and _longer_than_one(old.shape) != _longer_than_one(new.shape):
            notes.append(note)  # axes are joined or split, and each is still there
        else:
            notes.append(_with_axes(note, new.ndim))
    return notes


def _longer_than_one(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n > 1]


def _inner(eqn: JaxprEqn) -> Program | None:
    """The program in an equation that calls one with all of its operands, as of ``jax.custom_vjp``."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars"):
            if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
                program: Program = value
                return program
    return None
