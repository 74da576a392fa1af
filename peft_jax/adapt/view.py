"""A lazy view of a weight: reshapes and transposes of it are recorded, not run, until the weight is used."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.core.product import Product
from peft_jax.core.untrained_row import untrained_row
from peft_jax.core.weight import Change, MergeError, Weight, as_leaf, varying, varying_over

Value = Any  # the value of a variable of a program: an array, or a `View` of a weight

BROADCAST, FREE = -1, -2  # in place of an axis: that of a broadcast, and one of the other operand


class Atom(NamedTuple):
    """A digit of an index along an axis of a weight: it counts up to ``size`` in steps of ``stride``."""

    axis: int
    stride: int
    size: int


Axis = tuple[Atom, ...]  # the digits of one axis of a view, major digit first


class Watch(Protocol):
    """Is called with each use of a weight, equation by equation."""

    def product(self, view: "View", contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> None:
        """A product over these digits is next; the weight's roles decide whether it runs on the side path."""

    def kernel(self, view: "View", axes: Sequence[int], groups: int) -> None:
        """Of the product that is next, these axes are positions in a kernel of so many groups of channels."""

    def done(self, view: "View", eqn: JaxprEqn | None, merged: bool) -> None:
        """An equation has used the weight; None stands for the program's end."""

    def inside(self, eqn: JaxprEqn) -> "Watch":
        """The watch inside of the function that this equation calls."""


@partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("axes", "watch", "untrained_row"))
@dataclasses.dataclass(frozen=True)
class View:
    """A weight whose axes were moved, split, joined or added. Digits of size 1 are left out."""

    weight: Weight
    axes: tuple[Axis, ...]
    watch: Watch | None = None
    untrained_row: int | None = None  # a row of the weight that lookups do not train

    @classmethod
    def of(cls, weight: Weight, watch: Watch | None = None) -> "View":
        """A weight as it is."""
        return cls(weight, tuple(map(_whole, range(weight.ndim), weight.shape)), watch)

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
        """The digits of these axes of the weight, in canonical order."""
        found: list[Atom] = []
        for axis in axes:
            own = [atom for atom in flat(self.axes) if atom.axis == axis]
            found += sorted(own, key=lambda atom: -atom.stride)
        return tuple(found)

    def dense(self) -> jax.Array:
        """The array."""
        have = self.digits(range(self.weight.ndim))
        added = _added(self.axes)
        array = self.weight.dense()
        if self.untrained_row is not None:
            array = untrained_row(array, self.untrained_row)
        return arrange(_broadcast(array, added), [*added, *have], self.axes)

    def by_row(self, shape: Sequence[int]) -> jax.Array | None:
        """The array, with rows of their own along its first axis, for an operand of what has this shape.

        None if the weight is one for all rows, or the first axis is not that of the rows.
        """
        rows = self.weight.by_row()
        if rows is None or not self.axes or shape[:1] != rows.shape[:1]:
            return None
        if any(atom.axis >= 0 for atom in self.axes[0]):
            return None
        batch, have = Atom(FREE, 0, len(rows)), self.digits(range(self.weight.ndim))
        added = _added(self.axes[1:])
        return arrange(_broadcast(rows, added), [*added, batch, *have], [(batch,), *self.axes[1:]])

    def done(self, eqn: JaxprEqn | None, *, merged: bool) -> None:
        """Report a use to the watch, if there is one."""
        if self.watch is not None:
            self.watch.done(self, eqn, merged)

    def role(self, contracted: Iterable[int], stacked: Iterable[int] = (), *, looks_up: bool = False) -> str | None:
        """Which side of the matrix these axes are: ``"in"``, ``"out"`` or neither."""
        digits = frozenset(flat(self.axes[i] for i in contracted))
        batch = frozenset(flat(self.axes[i] for i in stacked))
        if self.watch is not None:
            self.watch.product(self, digits, batch, looks_up)
        layout = self.weight.layout
        if not layout.inp or any(atom.axis not in (BROADCAST, *layout.stack) for atom in batch):
            return None
        if digits == set(self.digits(layout.inp)):
            return "in"
        return "out" if digits == set(self.digits(layout.out)) else None

    def as_kernel(self, out: int, matrix: jax.Array) -> jax.Array:
        """A matrix ``(in, k)`` in this shape, with ``k`` in place of the axis ``out``, which has all outputs."""
        channels = free(0, matrix.shape[1])
        want = [*self.axes[:out], channels, *self.axes[out + 1 :]]
        return arrange(matrix, [*self.digits(self.weight.layout.inp), *channels], want)

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
            if _whole(stacked, self.weight.shape[stacked]) == self.axes[axis]:
                return position
        return None

    def mapped(self, axis: int, change: Change, *, drop: bool) -> "View | None":
        """The view after ``change(array, axis)`` along a stacked axis, which with ``drop`` is then gone."""
        position = self.stack_position(axis)
        if position is None:
            return None
        gone, weight = self.weight.layout.stack[position], self.weight.mapped(position, change, drop=drop)
        if not drop:
            axes = (*self.axes[:axis], _whole(gone, weight.shape[gone]), *self.axes[axis + 1 :])
            return self.replace(weight=weight, axes=axes)
        left = (*self.axes[:axis], *self.axes[axis + 1 :])
        return self.replace(weight=weight, axes=tuple(_without_axis(one, gone) for one in left))

    def specs(self, entries: Sequence[Any]) -> "View | None":
        """Specs of all arrays, in the view's structure, for those of its axes; None if there are none such."""
        wanted = View.of(self.weight).axes
        if sorted(self.axes) != sorted(wanted):
            return None
        of_weight: list[Any] = []
        for axis in wanted:
            of_weight.append(entries[self.axes.index(axis)] if axis else None)
        try:
            specs = self.weight.specs(tuple(of_weight))
        except MergeError:
            return None
        return self.replace(weight=specs)

    def refreshed(self) -> "View":
        """The view of a part of the weight, as ``shard_map`` hands it out, after `specs`."""
        wanted = View.of(self.weight).axes
        axes: list[Axis] = []
        for axis in self.axes:
            axes.append(wanted[axis[0].axis] if axis else ())
        return self.replace(axes=tuple(axes))


def is_view(value: Value) -> bool:
    """Whether a value is a view of a weight."""
    return isinstance(value, View)


def free(number: int, size: int) -> Axis:
    """An axis that no weight has."""
    return (Atom(FREE, number, size),)


def flat(axes: Iterable[Axis]) -> tuple[Atom, ...]:
    """The digits of some axes, in order."""
    return tuple(itertools.chain.from_iterable(axes))


def length(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in axis)


def arrange(array: jax.Array, have: Sequence[Atom], want: Sequence[Axis]) -> jax.Array:
    """An array whose axes hold the digits ``have``, in any grouping, with the axes ``want``."""
    order = [have.index(atom) for atom in flat(want)]
    if order != sorted(order):
        array = jnp.transpose(_reshape(array, [atom.size for atom in have]), order)
    return _reshape(array, [length(axis) for axis in want])


def through(
    view: View, x: jax.Array, have: Sequence[Axis], want: Sequence[Axis], role: str, product: Product
) -> jax.Array | None:
    """A product with each stacked layer of a weight, axes found by their digits; None if there is no such product.

    Args:
        view: The weight.
        x: The other operand.
        have: Its axes. Digits of the weight mean that both operands have the axis.
        want: The axes of the result.
        role: The side of the matrix that ``x`` meets.
        product: The product.
    """
    layout = view.weight.layout
    met, kept = view.digits(layout.inp), view.digits(layout.out)
    if role == "out":
        met, kept = kept, met
    there = flat(have)
    groups, front = [view.digits((axis,)) for axis in layout.stack], []
    batched = []
    for group in groups:
        found = set(group) & set(there)
        if found and found != set(group):
            return None
        is_shared = found == set(group)
        batched.append(is_shared)
        if is_shared and group:
            front.append(group)
    others = [(atom,) for atom in there if atom.axis < 0]
    last = [] if product.looks_up else [met]
    result = [*flat(groups), *flat(others), *kept]
    if set(flat(want)) != set(result):
        return None
    how = _How(there, (*front, *others, *last), tuple(batched), role == "out", product, tuple(result), tuple(want))
    return _use_weight(x, view.weight, how)


class _How(NamedTuple):
    """Axes of x, as they are and as they are wanted; how each layer is used; axes of the result, likewise."""

    there: tuple[Atom, ...]
    met: tuple[Axis, ...]
    batched: tuple[bool, ...]
    transpose: bool
    product: Product
    result: tuple[Atom, ...]
    want: tuple[Axis, ...]


@partial(jax.jit, static_argnames="how")  # so that one of many like layers is traced, not each of them
def _use_weight(x: jax.Array, weight: Weight, how: _How) -> jax.Array:
    use = partial(_product, product=how.product, transpose=how.transpose)
    y = _over_stack(use, how.batched)(arrange(x, how.there, how.met), weight)
    return arrange(y, how.result, how.want)


def _product(x: jax.Array, weight: Weight, product: Product, transpose: bool) -> jax.Array:
    if not transpose:
        return weight.apply(x, product)
    if product.preferred_element_type not in (None, x.dtype):  # a transpose has the types of its forward product
        x, weight = x.astype(product.preferred_element_type), weight.astype(product.preferred_element_type)
    product = product.replace(preferred_element_type=None, out_sharding=None)
    # Inside shard_map x has to vary over the axes that the weight varies over, or the transpose would sum over them.
    x = varying_over(x, frozenset().union(*map(varying, jax.tree.leaves(as_leaf(weight)))))
    n_in, _ = weight.layout.sizes(weight.shape)
    probe = jax.typeof(x).update(shape=(*x.shape[:-1], n_in), weak_type=False)
    (y,) = jax.linear_transpose(lambda probe: weight.apply(probe, product), probe)(x)
    return y


def _over_stack(use: Callable[..., jax.Array], batched: Sequence[bool]) -> Callable[..., jax.Array]:
    """``use`` mapped over the stacked axes of a weight, and over those axes of x that stand for the same layers."""
    if not batched:
        return use
    rest = _over_stack(use, batched[1:])

    def mapped(x: jax.Array, weight: Weight) -> jax.Array:
        if weight.shape[weight.layout.stack[0]] == 1:
            return rest(x, weight.mapped(0, lambda array, axis: jnp.squeeze(array, axis), drop=True))
        front = weight.mapped(0, in_front, drop=True)
        return jax.vmap(rest, in_axes=(0 if batched[0] else None, 0))(x, front)

    return mapped


def in_front(array: jax.Array, axis: int) -> jax.Array:
    """The array with one axis before all others."""
    return jnp.moveaxis(array, axis, 0) if axis else array


def _added(axes: Iterable[Axis]) -> list[Atom]:
    """The digits of broadcasts among those of some axes."""
    return [atom for atom in flat(axes) if atom.axis == BROADCAST]


def _broadcast(array: jax.Array, added: Sequence[Atom]) -> jax.Array:
    """The array with the axes of a broadcast in front."""
    if not added:
        return array
    return jnp.broadcast_to(array, (*[atom.size for atom in added], *array.shape))


def _without_axis(axis: Axis, gone: int) -> Axis:
    """An axis of a view once its weight has lost one of its own axes."""
    return tuple(atom._replace(axis=atom.axis - (atom.axis > gone)) for atom in axis)


def _whole(axis: int, size: int) -> Axis:
    """An axis of the view that is one of the weight's, unchanged."""
    return () if size == 1 else (Atom(axis, 1, size),)


def _reshape(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    return array if array.shape == tuple(shape) else jnp.reshape(array, tuple(shape))
