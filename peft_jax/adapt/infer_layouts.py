"""Which axes of each leaf are inputs, outputs and stacked layers, read off the program that uses the leaves."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.view import Atom, View
from peft_jax.core.layout import READ, Ambiguous, Layout, conventional_layout
from peft_jax.core.paths import dotted, named_leaves
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.weight import Change, Weight, is_weight


class Use(NamedTuple):
    """A product that a leaf takes part in: its axes by their role in it."""

    stack: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]
    looks_up: bool


@partial(jax.tree_util.register_dataclass, data_fields=("part",), meta_fields=("ndims", "labels", "cut"))
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
    """A leaf of unknown axes: any axis may be a stacked one, none an input.

    Attributes:
        part: The leaf, or a part of it.
        ndims: How many axes the leaf has.
        labels: Which of them each axis of the array is; those that are missing were stacked layers.
        cut: Those of which one layer was chosen.
    """

    part: Any
    ndims: int
    labels: tuple[int, ...]
    cut: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.part.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Its element type."""
        return self.part.dtype

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        """All axes are stacked."""
        return Layout(stack=tuple(range(len(self.labels))), inp=(), out=())

    @property
    def array(self) -> jax.Array:
        """The part."""
        return self.part

    def dense(self) -> jax.Array:
        """The part."""
        return self.part

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """Never called: a leaf without inputs is merged."""
        raise TypeError("a leaf whose axes are unknown has no product")

    def astype(self, dtype: jnp.dtype) -> "Probe":
        """The leaf in another element type."""
        return dataclasses.replace(self, part=self.part.astype(dtype))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Probe":
        """The leaf without an axis, or with a part of it."""
        array, label = change(self.part, position), self.labels[position]
        if drop:
            return dataclasses.replace(self, part=array, labels=tuple(i for i in self.labels if i != label))
        return dataclasses.replace(self, part=array, cut=(*self.cut, label) if array.shape[position] == 1 else self.cut)

    def relaid(self, layout: Layout) -> "Probe":
        """Itself: it has no layout to change."""
        return self

    def specs(self, entries: tuple[Any, ...]) -> "Probe":
        """The entries."""
        return dataclasses.replace(self, part=PartitionSpec(*entries))

    def use(self, contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> Use:
        """A product over some digits, in terms of the leaf's axes."""
        inp = tuple(sorted({self.labels[atom.axis] for atom in contracted if atom.axis >= 0}))
        met = {i: math.prod(atom.size for atom in contracted if atom.axis == i) for i in range(len(self.labels))}
        partly = {self.labels[i] for i, n in met.items() if 1 < n < self.shape[i]}
        kept = {self.labels[atom.axis] for atom in stacked if atom.axis >= 0}
        stack = tuple(i for i in range(self.ndims) if i not in self.labels or i in kept or i in self.cut)
        out = tuple(i for i in range(self.ndims) if i not in (*stack, *inp) or i in partly or i in {*stack} & {*inp})
        return Use(stack, inp, out, looks_up)


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the products of one leaf."""

    uses: list[Use]
    kernels: set[tuple[tuple[int, ...], int]] = dataclasses.field(default_factory=set)

    def kernel(self, view: View, axes: Sequence[int], groups: int) -> None:
        probe = view.weight
        assert isinstance(probe, Probe)
        ones = [axis for axis in range(len(probe.labels)) if probe.shape[axis] == 1]  # any of these is as good
        found = []
        for i in axes:
            at = view.axes[i][0].axis if view.axes[i] else i if i in ones else ones[0]
            ones = [axis for axis in ones if axis != at]
            found.append(probe.labels[at])
        self.kernels.add((tuple(found), groups))

    def product(self, view: View, contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> None:
        assert isinstance(view.weight, Probe)
        self.uses.append(view.weight.use(contracted, stacked, looks_up))

    def done(self, eqn: Any, merged: bool) -> None:
        pass

    def inside(self, eqn: Any) -> "_Note":
        return self


def read_layouts(
    params: Any, fn: Callable[..., Any], args: Sequence[Any], fan_in_fan_out: bool = False
) -> Mapping[str, Layout | Ambiguous]:
    """The layout of every leaf that ``fn(params, *args)`` uses in a product, by its path.

    A leaf that is looked up has its rows as inputs. A leaf that is used both as it is and transposed has the side
    that the framework's convention says.

    Args:
        params: Any pytree of arrays; quantized and adapted leaves have their layouts already.
        fn: The function that uses them.
        args: The rest of its arguments; arrays, or shapes as ``jax.ShapeDtypeStruct``.
        fan_in_fan_out: As in `conventional_layout`.

    Returns:
        Layouts, and for a leaf whose uses contradict each other what they are.
    """
    found = named_leaves(params, is_leaf=is_weight)
    notes = {path: _Note([]) for path, leaf in found.items() if not is_weight(leaf) and getattr(leaf, "ndim", 0) > 1}

    def probed(key_path: Any, leaf: Any) -> Any:
        if dotted(key_path) not in notes:
            return leaf
        return Probe(leaf, leaf.ndim, tuple(range(leaf.ndim)))

    tree = jax.tree_util.tree_map_with_path(probed, params, is_leaf=is_weight)
    leaves, treedef = jax.tree.flatten(((tree, *args), {}), is_leaf=is_weight)
    jaxpr, values, _ = trace(fn, leaves, treedef)
    watches = iter(notes.values())
    views = [_view(value, watches) for value in values]
    jax.eval_shape(lambda views: evaluate(jaxpr, *views), views)
    read = {}
    for name, leaf in found.items():
        if name in notes and notes[name].uses:
            convention = conventional_layout(name, leaf.shape, fan_in_fan_out)
            settled = _settled(name, notes[name].uses, convention)
            kernel = next(iter(notes[name].kernels)) if len(notes[name].kernels) == 1 else ((), 1)
            read[name] = _of_kernel(settled, *kernel) if isinstance(settled, Layout) else settled
    return read


def _view(value: Any, watches: Any) -> Any:
    if isinstance(value, Probe):
        return View.of(value, next(watches))
    return View.of(value) if is_weight(value) else value


def _settled(path: str, uses: Sequence[Use], convention: Layout | None) -> Layout | Ambiguous:
    """The one layout that all uses agree with."""
    uses = [use for use in uses if use.inp and use.out]
    if not uses:  # axes of length 1 leave no trace in a product
        return convention or Ambiguous("its axes of length 1 do not tell what they are")
    rows = [use for use in uses if use.looks_up]
    sides = {(use.stack, frozenset((use.inp, use.out))) for use in uses}
    if any(use.looks_up and use.inp == (0,) and len(use.out) > 1 for use in uses):
        told = tuple(map(_words, dict.fromkeys(uses)))
        return Ambiguous("its first axis is looked up, which may be a choice of layers or of rows", told)
    if len(sides) > 1 or any(set(use.inp) & set(use.out) for use in uses):
        return Ambiguous("the program uses its axes in more than one way", tuple(map(_words, dict.fromkeys(uses))))
    first = rows[0] if rows else uses[0]
    turned = {use.inp for use in uses if not use.looks_up}
    if not rows and len(turned) > 1:
        if convention is None or convention.inp not in turned:
            told = tuple(map(_words, dict.fromkeys(uses)))
            return Ambiguous("the program uses it both as it is and transposed", told)
        first = next(use for use in uses if use.inp == convention.inp)
    after = _index_after(path, len(first.stack))
    multiplied = len(rows) < len(uses)
    return Layout(first.stack, first.inp, first.out, bool(rows), after, READ, multiplied=multiplied)


def _of_kernel(layout: Layout, taps: tuple[int, ...], groups: int) -> Layout:
    """The layout with positions in a kernel, those of length 1 too, among the inputs."""
    if not set(taps) <= {*layout.inp, *layout.out}:
        return layout
    inp, out = tuple(sorted({*layout.inp, *taps})), tuple(axis for axis in layout.out if axis not in taps)
    return dataclasses.replace(layout, inp=inp, out=out, taps=taps, groups=groups) if out else layout


def _words(use: Use) -> str:
    return f"stack={use.stack}, inp={use.inp}, out={use.out}" + (", looked up" if use.looks_up else "")


def _index_after(path: str, stacked: int) -> tuple[str, ...]:
    """Path components after which the indices of stacked axes go: ``layers`` if it is there, else from the front on."""
    parts = path.split(".")
    front = ["layers", *(part for part in parts if part != "layers")] if "layers" in parts else parts
    return tuple(front[min(i, len(front) - 1)] for i in range(stacked))
