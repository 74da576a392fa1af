"""Weights of a program that are not seen to be weights, for they reach their product through what is not followed.

The program is walked through with a note for each variable: which leaves it is made of, as long as it is made of
leaves and constants alone. What depends on the inputs, activations, has no such note. A leaf in one operand of a
product is one of its weights.

Not seen are a weight that is changed by an array of the inputs, for which a gain or a table of positions would look
the same, and one that is broadcast before it is changed.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapt import compat
from peft_jax.adapt.infer_layouts import Probe
from peft_jax.adapt.interpreter import trace
from peft_jax.adapt.rules import RULES
from peft_jax.adapt.view import View
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight

PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
KERNELS = ("pallas_call", "ffi_call")  # nobody sees inside; a matrix that meets activations there may be multiplied
CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", "scan", "while", "cond", "shard_map")
MOVES = set(RULES) - {*PRODUCTS, *CALLS, "gather", "add", "sub", "mul", "div"}
ONE_BY_ONE = ("optimization_barrier", "device_put")  # each output is the operand in its place


class Loss(NamedTuple):
    """Where a leaf is no longer followed."""

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


def left_out(params: Any, fn: Callable[..., Any], args: Sequence[Any], paths: Collection[str]) -> dict[str, Loss]:
    """Those of some leaves that ``fn(params, *args)`` multiplies by, and where they are no longer followed.

    Args:
        params: A tree.
        fn: The function.
        args: The rest of its arguments.
        paths: Paths of the leaves to look for.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((4, 8)), "gain": jnp.ones(8)}}
        >>> def model(params, x):
        ...     return params["up"]["gain"] * (x @ (0.5 * params["up"]["kernel"]))
        >>> found = left_out(params, model, (jnp.ones((1, 4)),), ["up.kernel", "up.gain"])
        >>> {path: loss.primitive for path, loss in found.items()}
        {'up.kernel': 'mul'}
    """
    if not paths:
        return {}
    leaves, treedef = jax.tree.flatten(((params, *args), {}), is_leaf=is_weight)
    program, _, _ = trace(fn, leaves, treedef)
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    names = [dotted(path) for path, leaf in found if is_weight(leaf) or compat.is_array(leaf)]
    notes: list[Note] = [None] * len(program.jaxpr.invars)
    for i, name in enumerate(names):
        notes[i] = {name: Part(program.jaxpr.invars[i].aval.ndim)}
    walk = _Walk({})
    walk.program(program, notes, None)
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
    """Walks through programs; ``found`` has the leaves that they multiply by."""

    found: dict[str, Loss]

    def program(self, program: Any, notes: Sequence[Note], place: str | None) -> list[Note]:
        """Notes of a program's outputs, given those of its inputs and where it was called."""
        jaxpr = compat.closed(program).jaxpr
        known: dict[Any, Note] = dict(zip(jaxpr.invars, notes, strict=True))

        def note(atom: Any) -> Note:
            return {} if compat.is_literal(atom) else known.get(atom, {})

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [note(atom) for atom in eqn.invars], place)
            for variable, out in zip(eqn.outvars, outs, strict=True):
                is_scalar = getattr(variable.aval, "ndim", 0) == 0
                known[variable] = {} if out is None and is_scalar else out  # a weight times a number is still a weight
        return [note(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, notes: list[Note], place: str | None) -> list[Note]:
        """Notes of an equation's outputs."""
        name = eqn.primitive.name
        loss = Loss(name, compat.where(eqn) or place or "a place inside a library")
        if name in CALLS:
            return self.call(eqn, notes, loss, compat.where(eqn) or place)
        if name in PRODUCTS:
            self.product(notes[:2], loss)
            return [None if None in notes else {}]
        if name in KERNELS:
            if None in notes:
                self.product([_joined(notes, skip_inputs=True), None], loss)
            return [None if None in notes else {}] * len(eqn.outvars)
        if (inner := _inner(eqn)) is not None:
            outs = self.program(inner, [_lost(note, loss) for note in notes], compat.where(eqn) or place)
            return [_lost(out, loss) for out in outs]
        if name in ONE_BY_ONE:
            return notes if name in MOVES else [_lost(note, loss) for note in notes]
        if name in MOVES and _is_followed(eqn):
            return [_moved(eqn, notes[0])]
        if name == "dynamic_slice":
            notes = notes[:1]
        shapes = [getattr(variable.aval, "shape", ()) for variable in eqn.outvars]
        if shapes:
            notes = [_own(eqn, i, note, shapes[0]) for i, note in enumerate(notes)]
        joined = _lost(_joined(notes), loss)
        return [_with_axes(joined, len(shape)) for shape in shapes]

    def product(self, notes: Sequence[Note], loss: Loss) -> None:
        """Take down the weights of a product of two operands.

        What was followed up to here is a weight, and a leaf that was not, if it meets one, is its input: as learned
        queries are, which are normalised first.
        """
        for note, other in (notes, notes[::-1]):
            meets = any(part.loss is None and part.ndim > 1 for part in (other or {}).values())
            for path, part in (note or {}).items():
                if part.ndim > 1 and not (part.loss and meets):
                    self.found.setdefault(path, part.loss or loss)

    def call(self, eqn: Any, notes: list[Note], loss: Loss, place: str | None) -> list[Note]:
        """Notes of what a call or a loop gives."""
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            parts = compat.scan_parts(eqn)
            end = parts.num_consts + parts.num_carry
            sliced = [
                _with_axes(note, atom.aval.ndim - 1) for note, atom in zip(notes[end:], eqn.invars[end:], strict=True)
            ]

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
            outs = self.program(compat.shard_map_parts(eqn).body, notes, place)
            return [_lost(out, loss) for out in outs]
        return self.program(p["jaxpr"], notes, place)

    def loop(self, step: Callable[["_Walk", list[Note]], list[Note]], carry: list[Note], loss: Loss) -> list[Note]:
        """Notes of what a loop gives; its body is walked through until those of what it carries stay."""
        carry = [_lost(note, loss) for note in carry]
        while True:
            outs = step(_Walk({}), carry)
            now = [_lost(_joined(pair), loss) for pair in zip(carry, outs[: len(carry)], strict=True)]
            if now == carry:
                break
            carry = now
        return [_lost(out, loss) for out in (*carry, *step(self, carry)[len(carry) :])]


def _joined(notes: Sequence[Note], *, skip_inputs: bool = False) -> Note:
    """The note of what is made of several variables."""
    joined: dict[str, Part] = {}
    for note in notes:
        if note is None and not skip_inputs:
            return None
        for path, part in (note or {}).items():
            old = joined.get(path, part)
            joined[path] = Part(max(old.ndim, part.ndim), old.spread and part.spread, old.loss or part.loss)
    return joined


def _lost(note: Note, loss: Loss) -> Note:
    return note and {path: part._replace(loss=part.loss or loss) for path, part in note.items()}


def _with_axes(note: Note, ndim: int) -> Note:
    """The note where at most so many axes are left."""
    return note and {path: part._replace(ndim=min(part.ndim, ndim)) for path, part in note.items()}


def _own(eqn: Any, operand: int, note: Note, shape: Sequence[int]) -> Note:
    """The leaves of an operand but those that are broadcast, as a gain for each column is: those are no matrices."""
    if note is None:
        return None
    shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in eqn.invars]
    is_update = eqn.primitive.name.startswith(("scatter", "dynamic_update_slice"))
    if shapes[operand] != tuple(shape) and tuple(shape) in shapes and not is_update:
        return {}
    return {path: part for path, part in note.items() if not part.spread}


def _is_followed(eqn: Any) -> bool:
    """Whether a move leaves a weight what it is."""
    if eqn.primitive.name == "convert_element_type":
        dtype = eqn.params["new_dtype"]
        return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    if eqn.primitive.name == "reshape":
        array = eqn.invars[0].aval
        return View.of(Probe(array, array.ndim, tuple(range(array.ndim)))).reshaped(eqn.params["new_sizes"]) is not None
    return True


def _moved(eqn: Any, note: Note) -> Note:
    """The note of an operand that is moved."""
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    if math.prod(new.shape) > math.prod(old.shape):
        return note and {path: part._replace(spread=True) for path, part in note.items()}
    joins = [n for n in old.shape if n > 1] != [n for n in new.shape if n > 1] and eqn.primitive.name == "reshape"
    return note if joins else _with_axes(note, new.ndim)


def _inner(eqn: Any) -> Any:
    """The program in an equation that calls one with all of its operands, as of ``jax.custom_vjp``."""
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars"):
            if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
                return value
    return None
