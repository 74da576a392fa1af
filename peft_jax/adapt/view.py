"""A lazy view of a weight: reshapes and transposes of it are recorded, not run, until the weight is used."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.adapt.digits import (
    BROADCAST,
    EDITED,
    FREE,
    Atom,
    Axis,
    arrange,
    broadcast_digits,
    flat,
    free,
    length,
    whole_axis,
    with_broadcasts,
    without_weight_axis,
)
from peft_jax.adapt.edits import Operation
from peft_jax.core.selecting import picked
from peft_jax.core.untrained_row import untrained_row
from peft_jax.core.weight import Change, MergeError, Weight

Value = Any  # the value of a variable of a program: an array, or a `View` of a weight
Evaluate = Callable[..., list[Value]]  # the outputs of a jaxpr on the values that follow it
Outputs = list[Value] | None  # of an equation; None where its weights have to be merged


class Edit(NamedTuple):
    """An operation on an axis of a view that is all inputs or all outputs.

    Attributes:
        source: The axis before it.
        operation: What is done to it.
        is_input: Whether it is one of inputs.
    """

    source: Axis
    operation: Operation
    is_input: bool


class Watch(Protocol):
    """Is called with each use of a weight, equation by equation."""

    def product(
        self, view: "View", contracted: frozenset[Atom], stacked: frozenset[Atom], over: Sequence[int], looks_up: bool
    ) -> None:
        """A product over the digits of the axes ``over`` is next; roles decide whether it runs on the side path."""

    def kernel(self, view: "View", axes: Sequence[int], groups: int) -> None:
        """Of the product that is next, these axes are positions in a kernel of so many groups of channels."""

    def done(self, view: "View", eqn: JaxprEqn | None, merged: bool) -> None:
        """An equation has used the weight; None stands for the program's end."""

    def inside(self, eqn: JaxprEqn) -> "Watch":
        """The watch inside of the function that this equation calls."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight",),
    meta_fields=("axes", "watch", "untrained_row", "edits", "shards"),
)
@dataclasses.dataclass(frozen=True)
class View:
    """A weight whose axes were moved, split, joined, added or edited. Digits of size 1 are left out.

    Inside of ``shard_map`` the weight is one device's part, and ``shards`` has the mesh axes by which each of its axes
    was split, as a spec has them.
    """

    weight: Weight
    axes: tuple[Axis, ...]
    watch: Watch | None = None
    untrained_row: int | None = None  # a row of the weight that lookups do not train
    edits: tuple[Edit, ...] = ()
    shards: tuple[Any, ...] = ()

    @classmethod
    def of(cls, weight: Weight, watch: Watch | None = None) -> "View":
        """A weight as it is."""
        return cls(weight, tuple(map(whole_axis, range(weight.ndim), weight.shape)), watch)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the view stands for."""
        return tuple(map(length, self.axes))

    @property
    def dtype(self) -> jnp.dtype:
        """Its element type."""
        return self.weight.dtype

    def replace(self, **changes: Any) -> "View":
        """The view with other fields."""
        return dataclasses.replace(self, **changes)

    def digits(self, axes: Iterable[int]) -> tuple[Atom, ...]:
        """The digits of these axes of the weight, or of results of edits, in canonical order."""
        known = flat([*self.axes, *(edit.source for edit in self.edits)])
        found: list[Atom] = []
        for axis in axes:
            own = [atom for atom in known if atom.axis == axis]
            found += sorted(own, key=lambda atom: -atom.stride)
        return tuple(found)

    def dense(self) -> jax.Array:
        """The array."""
        have = self.digits(range(self.weight.ndim))
        added = broadcast_digits(self.axes)
        array = self.weight.dense()
        if self.untrained_row is not None:
            array = untrained_row(array, self.untrained_row)
        array, there = with_broadcasts(array, added), [*added, *have]
        for number in range(len(self.edits)):
            array, there = self.with_edit(number, array, there)
        return arrange(array, there, self.axes)

    def with_edit(self, number: int, array: jax.Array, have: Sequence[Atom]) -> tuple[jax.Array, list[Atom]]:
        """An array of the digits ``have`` after an edit, and its digits."""
        edit = self.edits[number]
        rest = [atom for atom in have if atom not in edit.source]
        array = arrange(array, have, [*((atom,) for atom in rest), edit.source])
        return edit.operation.along(array, array.ndim - 1), [*rest, *self.digits([EDITED + number])]

    def before_edit(self, number: int, array: jax.Array, have: Sequence[Atom]) -> tuple[jax.Array, list[Atom]]:
        """The transpose of `with_edit`: an array that is multiplied by the result of an edit meets its source."""
        edit = self.edits[number]
        result = self.digits([EDITED + number])
        rest = [atom for atom in have if atom not in result]
        array = arrange(array, have, [*((atom,) for atom in rest), result])
        array = edit.operation.transposed(array, array.ndim - 1, length(edit.source))
        return array, [*rest, *edit.source]

    def edited(self, axis: int, operation: Operation) -> "View | None":
        """The view after an operation along one axis, if it is one of inputs or of outputs alone."""
        layout, source = self.weight.layout, self.axes[axis]
        if not layout.inp or not source or self.untrained_row is not None:
            return None
        inputs, outputs = self._sides()
        is_input = set(source) <= inputs
        if not (is_input or set(source) <= outputs):
            return None
        n = operation.length(length(source))
        if n < 1:
            return None
        made: Axis = () if n == 1 else (Atom(EDITED + len(self.edits), 1, n),)
        axes = (*self.axes[:axis], made, *self.axes[axis + 1 :])
        return self.replace(axes=axes, edits=(*self.edits, Edit(source, operation, is_input)))

    def _sides(self) -> tuple[set[Atom], set[Atom]]:
        """The digits that are inputs, and those that are outputs, those of edits among them."""
        inputs, outputs = set(self.digits(self.weight.layout.inp)), set(self.digits(self.weight.layout.out))
        for number, edit in enumerate(self.edits):
            (inputs if edit.is_input else outputs).update(self.digits([EDITED + number]))
        return inputs, outputs

    def by_row(self, shape: Sequence[int]) -> jax.Array | None:
        """The array, with rows of their own along its first axis, for an operand of what has this shape.

        None if the weight is one for all rows, or the first axis is not that of the rows.
        """
        rows = self.weight.by_row()
        if rows is None or not self.axes or self.edits or shape[:1] != rows.shape[:1]:
            return None
        if any(atom.axis >= 0 for atom in self.axes[0]):
            return None
        batch, have = Atom(FREE, 0, len(rows)), self.digits(range(self.weight.ndim))
        added = broadcast_digits(self.axes[1:])
        return arrange(with_broadcasts(rows, added), [*added, batch, *have], [(batch,), *self.axes[1:]])

    def done(self, eqn: JaxprEqn | None, *, merged: bool) -> None:
        """Report a use to the watch, if there is one."""
        if self.watch is not None:
            self.watch.done(self, eqn, merged)

    def role(self, contracted: Iterable[int], stacked: Iterable[int] = (), *, looks_up: bool = False) -> str | None:
        """Which side of the matrix these axes are: ``"in"``, ``"out"`` or neither."""
        over = tuple(contracted)
        digits = frozenset(flat(picked(self.axes, over)))
        batch = frozenset(flat(picked(self.axes, stacked)))
        if self.watch is not None:
            self.watch.product(self, digits, batch, over, looks_up)
        layout = self.weight.layout
        if not layout.inp or any(atom.axis not in (BROADCAST, *layout.stack) for atom in batch):
            return None
        if self._before_edits(digits, is_input=True) == set(self.digits(layout.inp)):
            return "in"
        return "out" if self._before_edits(digits, is_input=False) == set(self.digits(layout.out)) else None

    def _before_edits(self, digits: frozenset[Atom], *, is_input: bool) -> set[Atom]:
        """Digits that are contracted, those that edits of one side make replaced by what they are made of."""
        before = set(digits)
        for number in reversed(range(len(self.edits))):
            result = set(self.digits([EDITED + number]))
            if self.edits[number].is_input == is_input and result <= before:
                before = before - result | set(self.edits[number].source)
        return before

    def as_kernel(self, out: int, matrix: jax.Array) -> jax.Array:
        """A matrix ``(in, k)`` in this shape, with ``k`` in place of the axis ``out``, which has all outputs."""
        channels = free(0, matrix.shape[1])
        want = [*self.axes[:out], channels, *self.axes[out + 1 :]]
        have: Sequence[Atom] = [*self.digits(self.weight.layout.inp), *channels]
        for number in range(len(self.edits)):
            matrix, have = self.with_edit(number, matrix, have)
        return arrange(matrix, have, want)

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The view as ``jnp.reshape`` leaves it, if no digit has to be cut in a way that is not one of a reshape."""
        if 0 in (*shape, *self.shape):
            return None
        atoms, axes = list(flat(self.axes)), []
        for n in shape:
            axis: list[Atom] = []
            while n != 1:
                if not atoms or max(n, atoms[0].size) % min(n, atoms[0].size):
                    return None
                atom = atoms.pop(0)
                if atom.size > n and atom.axis == BROADCAST:
                    return None
                if atom.size > n:  # its major part is what is left of this axis
                    rest = atom.size // n
                    atoms.insert(0, atom._replace(size=rest))
                    atom = Atom(atom.axis, atom.stride * rest, n)
                axis.append(atom)
                n //= atom.size
            axes.append(tuple(axis))
        return self.replace(axes=tuple(axes))

    def stack_position(self, axis: int) -> int | None:
        """Which of the weight's stacked axes, counted from 0, this axis is; None if it is not one."""
        for position, stacked in enumerate(self.weight.layout.stack):
            if whole_axis(stacked, self.weight.shape[stacked]) == self.axes[axis]:
                return position
        return None

    def apart(self, axis: int) -> "View":
        """The view with this axis, if it is a part of a stacked one, as a stacked axis of its own."""
        if len(self.axes[axis]) != 1 or self.stack_position(axis) is not None:
            return self
        stacked, stack = self.axes[axis][0].axis, self.weight.layout.stack
        digits = self.digits([stacked])
        if stacked not in stack:
            return self
        try:
            weight = self.weight.split(stack.index(stacked), [atom.size for atom in digits])
        except MergeError:
            return self

        def renamed(axis: Axis) -> Axis:
            atoms = []
            for atom in axis:
                if atom in digits:
                    atom = Atom(stacked + digits.index(atom), 1, atom.size)
                elif stacked < atom.axis < EDITED:
                    atom = atom._replace(axis=atom.axis + len(digits) - 1)
                atoms.append(atom)
            return tuple(atoms)

        edits = [edit._replace(source=renamed(edit.source)) for edit in self.edits]
        inner = [None] * (len(digits) - 1)
        shards = (*self.shards[: stacked + 1], *inner, *self.shards[stacked + 1 :]) if self.shards else ()
        return self.replace(weight=weight, axes=tuple(map(renamed, self.axes)), edits=tuple(edits), shards=shards)

    def joined(self, axis: int) -> "View | None":
        """The view with this axis and the next one as one, if both are stacked axes that are beside each other."""
        position, following = self.stack_position(axis), self.stack_position(axis + 1)
        if position is None or following != position + 1:
            return None
        first, second = self.weight.layout.stack[position : position + 2]
        if second != first + 1:
            return None
        try:
            weight = self.weight.join(position)
        except MergeError:
            return None
        axes = [without_weight_axis(one, second) for one in self.axes]
        axes[axis : axis + 2] = [whole_axis(first, weight.shape[first])]
        edits = [edit._replace(source=without_weight_axis(edit.source, second)) for edit in self.edits]
        return self.replace(weight=weight, axes=tuple(axes), edits=tuple(edits), shards=())

    def mapped(self, axis: int, change: Change, *, drop: bool) -> "View | None":
        """The view after ``change(array, axis)`` along a stacked axis, which with ``drop`` is then gone."""
        apart = self.apart(axis)
        if apart is not self:
            return apart.mapped(axis, change, drop=drop)
        position = self.stack_position(axis)
        if position is None:
            return None
        gone, weight = self.weight.layout.stack[position], self.weight.mapped(position, change, drop=drop)
        if not drop:
            axes = (*self.axes[:axis], whole_axis(gone, weight.shape[gone]), *self.axes[axis + 1 :])
            return self.replace(weight=weight, axes=axes)
        return self._without((*self.axes[:axis], *self.axes[axis + 1 :]), weight, gone)

    def without_single_layers(self) -> "View":
        """The view of a weight that has no stacked axes of length 1, which no axis of a view has digits of."""
        view = self
        for position in reversed(range(len(self.weight.layout.stack))):
            gone = view.weight.layout.stack[position]
            if view.weight.shape[gone] == 1:
                weight = view.weight.mapped(position, jnp.squeeze, drop=True)
                view = view._without(view.axes, weight, gone)
        return view

    def _without(self, axes: Iterable[Axis], weight: Weight, gone: int) -> "View":
        """The view with these axes of a weight that has lost an axis."""
        edits = [edit._replace(source=without_weight_axis(edit.source, gone)) for edit in self.edits]
        left = tuple(without_weight_axis(one, gone) for one in axes)
        shards = (*self.shards[:gone], *self.shards[gone + 1 :])
        return self.replace(weight=weight, axes=left, edits=tuple(edits), shards=shards)

    def specs(self, entries: Sequence[Any]) -> "View | None":
        """Specs of all arrays, in the view's structure, for those of its axes; None if there are none such."""
        if self.edits or sorted(self.axes) != sorted(View.of(self.weight).axes):
            return None
        try:
            specs = self.weight.specs(self._of_weight(entries))
        except MergeError:
            return None
        return self.replace(weight=specs)

    def _of_weight(self, entries: Sequence[Any]) -> tuple[Any, ...]:
        """Entries for the axes of the weight, given those for the axes of the view."""
        found: list[Any] = [None] * self.weight.ndim
        for axis, entry in zip(self.axes, entries, strict=True):
            if axis:
                found[axis[0].axis] = entry
        return tuple(found)

    def part(self, entries: Sequence[Any]) -> "View":
        """The view of a part of the weight, as ``shard_map`` hands it out, after `specs` of these entries."""
        wanted = View.of(self.weight).axes
        axes: list[Axis] = []
        for axis in self.axes:
            axes.append(wanted[axis[0].axis] if axis else ())
        return self.replace(axes=tuple(axes), shards=self._of_weight(entries))

    def axis_over(self, mesh_axes: str | tuple[str, ...]) -> int | None:
        """The axis of the weight that ``shard_map`` has split over these axes of a mesh and no others."""
        names = mesh_axes if isinstance(mesh_axes, tuple) else (mesh_axes,)
        for axis, entry in enumerate(self.shards):
            if entry in (names, *names[: len(names) == 1]):
                return None if self.edits else axis
        return None


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class Joined:
    """Views of several weights side by side along an axis."""

    parts: tuple[View, ...]
    axis: int

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts along the axis."""
        return [part.shape[self.axis] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the views stand for."""
        shape = self.parts[0].shape
        return (*shape[: self.axis], sum(self.sizes), *shape[self.axis + 1 :])

    @property
    def dtype(self) -> jnp.dtype:
        """Its element type."""
        return self.parts[0].dtype

    def dense(self) -> jax.Array:
        """The array."""
        return jax.lax.concatenate([part.dense() for part in self.parts], self.axis)

    def done(self, eqn: JaxprEqn | None, *, merged: bool) -> None:
        """Report a use to the watches, if there are any."""
        for part in self.parts:
            part.done(eqn, merged=merged)


def is_view(value: Value) -> bool:
    """Whether a value is a view of a weight."""
    return isinstance(value, View)


def stands_for_weights(value: Value) -> bool:
    """Whether a value is a view of a weight, or views of several."""
    return isinstance(value, (View, Joined))


def views_in(value: Value) -> tuple[View, ...]:
    """The views of which a value is made."""
    if isinstance(value, Joined):
        return value.parts
    return (value,) if isinstance(value, View) else ()


def is_watched(value: Value) -> bool:
    """Whether someone watches a weight in a value."""
    return any(view.watch is not None for view in views_in(value))


def rewatched(value: Value, change: Callable[[Watch], Watch | None]) -> Value:
    """A value with other watches of its weights."""
    if isinstance(value, Joined):
        return dataclasses.replace(value, parts=tuple(rewatched(part, change) for part in value.parts))
    if isinstance(value, View) and value.watch is not None:
        return value.replace(watch=change(value.watch))
    return value
