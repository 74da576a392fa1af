"""Which axes of each leaf are inputs, outputs and stacked layers, read off the program that uses the leaves."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.biases import read_biases
from peft_jax.adapt.digits import Atom
from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.members import leaves_of_members
from peft_jax.adapt.view import Value, View
from peft_jax.core.layout import LISTS, READ, Ambiguous, Layout, conventional_layout
from peft_jax.core.leaves import Program
from peft_jax.core.paths import dotted, module_path, named_leaves
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.pytree import KeyPath, PyTree
from peft_jax.core.weight import Change, Weight, is_weight

CUT = -1  # the label of an axis of which one index was chosen


class Use(NamedTuple):
    """A product that a leaf takes part in: its axes by their role in it; ``batched`` are those that the product stacks.

    The other stacked axes are layers: a loop sliced them, or one of them was taken.
    """

    stack: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]
    looks_up: bool
    batched: tuple[int, ...] = ()


class Reading(NamedTuple):
    """A program that was read.

    Attributes:
        jaxpr: The program.
        paths: For each of its inputs the path of the leaf, None for other arguments.
        merges: For each leaf of unknown axes the ids of the equations through which it was not followed.
    """

    jaxpr: ClosedJaxpr
    paths: Sequence[str | None]
    merges: Mapping[str, Collection[int]]


class Touch(NamedTuple):
    """Any use of a leaf: which of its axes were layers, which are left, and whether it was multiplied elementwise."""

    layers: tuple[int, ...]
    rest: tuple[int, ...]
    elementwise: bool


@partial(jax.tree_util.register_dataclass, data_fields=("part",), meta_fields=("ndims", "labels"))
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
    """A leaf of unknown axes: any axis may be a stacked one, none an input.

    Attributes:
        part: The leaf, or a part of it.
        ndims: How many axes the leaf has.
        labels: Which of them each axis of the array is, those that are a part of one and those of which one index was
            chosen (`CUT`) among them; those that are missing were stacked layers.
    """

    part: Any  # an array or its shape, and a spec after `specs`
    ndims: int
    labels: tuple[int, ...]

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
        array, labels = change(self.part, position), list(self.labels)
        if drop:
            del labels[position]
        elif array.ndim == self.ndim and array.shape[position] == 1:
            labels[position] = CUT
        return dataclasses.replace(self, part=array, labels=tuple(labels))

    def split(self, position: int, sizes: Sequence[int]) -> "Probe":
        """The leaf with an axis split into several."""
        shape = (*self.shape[:position], *sizes, *self.shape[position + 1 :])
        labels = (*self.labels[:position], *[self.labels[position]] * len(sizes), *self.labels[position + 1 :])
        return dataclasses.replace(self, part=self.part.reshape(shape), labels=labels)

    def join(self, position: int) -> "Probe":
        """The leaf with an axis and the next one as one, which is a part of the second."""
        n, m = self.shape[position : position + 2]
        part = self.part.reshape(*self.shape[:position], n * m, *self.shape[position + 2 :])
        return dataclasses.replace(self, part=part, labels=(*self.labels[:position], *self.labels[position + 1 :]))

    def relaid(self, layout: Layout) -> "Probe":
        """The leaf itself, which has no layout to change."""
        return self

    def specs(self, entries: tuple[Any, ...]) -> "Probe":
        """The entries."""
        return dataclasses.replace(self, part=PartitionSpec(*entries))

    def use(self, contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> Use:
        """A product over some digits, in terms of the leaf's axes."""
        inp, partly = set[int](), set[int]()
        for label in set(self.labels) - {CUT}:
            own = [i for i, other in enumerate(self.labels) if other == label]
            sizes = [atom.size for atom in contracted if atom.axis in own]
            if sizes:
                inp.add(label)
            if 1 < math.prod(sizes) < math.prod(self.shape[i] for i in own):
                partly.add(label)
        layers, _ = self.sliced()
        stack = set(layers)
        for atom in stacked:
            if atom.axis >= 0:
                stack.add(self.labels[atom.axis])
        # An axis that is contracted in part, or stacked and contracted in one, is an output too: a contradiction.
        out = set(range(self.ndims)) - stack - inp | partly | stack & inp
        batched = stack - set(layers)
        return Use(_in_order(stack), _in_order(inp), _in_order(out), looks_up, _in_order(batched))

    def with_single_input(self, use: Use, are_all: bool) -> Use:
        """The use in a product over axes of length 1, which leave no digit: the leaf's only one, or all of them."""
        ones = [label for label, size in zip(self.labels, self.shape, strict=True) if size == 1 and label != CUT]
        if not (are_all or len(ones) == 1):
            return use
        return use._replace(inp=_in_order(ones), out=_without(use.out, ones))

    def sliced(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leaf's axes that are layers of it, by a loop or a choice, and its other axes."""
        rest = set(self.labels) - {CUT}
        return _without(range(self.ndims), rest), _in_order(rest)


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the products of one leaf, and all its uses."""

    uses: list[Use]
    of_one_input: list[Use] = dataclasses.field(default_factory=list)  # of which no digit tells
    touches: list[Touch] = dataclasses.field(default_factory=list)
    kernels: set[tuple[tuple[int, ...], int]] = dataclasses.field(default_factory=set)
    merges: set[int] = dataclasses.field(default_factory=set)  # ids of equations

    def kernel(self, view: View, axes: Sequence[int], groups: int) -> None:
        probe = view.weight
        assert isinstance(probe, Probe)
        ones = [axis for axis, size in enumerate(probe.shape) if size == 1]  # any of these is as good
        found = []
        for i in axes:
            if view.axes[i]:
                at = view.axes[i][0].axis
            elif ones:
                at = i if i in ones else ones[0]
            else:
                continue  # an axis of length 1 that the program has added
            if at in ones:
                ones.remove(at)
            found.append(probe.labels[at])
        self.kernels.add((tuple(found), groups))

    def product(
        self, view: View, contracted: frozenset[Atom], stacked: frozenset[Atom], over: Sequence[int], looks_up: bool
    ) -> None:
        assert isinstance(view.weight, Probe)
        use = view.weight.use(contracted, stacked, looks_up)
        self.uses.append(use)
        met = sum(not view.axes[i] for i in over)
        if met and not contracted:
            are_all = met == sum(not axis for axis in view.axes)
            self.of_one_input.append(view.weight.with_single_input(use, are_all))

    def done(self, view: View, eqn: JaxprEqn | None, merged: bool) -> None:
        assert isinstance(view.weight, Probe)
        elementwise = eqn is not None and compat.is_elementwise(eqn)
        if merged and eqn is not None:
            self.merges.add(id(eqn))
        self.touches.append(Touch(*view.weight.sliced(), elementwise))

    def inside(self, eqn: JaxprEqn) -> "_Note":
        return self

    def vector(self) -> Touch | None:
        """One of the uses, if by all of them one layer of the leaf is a vector: it has one axis, or takes no inputs."""
        if any(use.inp and use.out for use in self.uses):
            return None
        if len({touch.layers for touch in self.touches}) != 1:
            return None
        has_one_axis = all(touch.layers and len(touch.rest) < 2 for touch in self.touches)
        is_elementwise = all(touch.elementwise for touch in self.touches)
        return self.touches[0] if has_one_axis or is_elementwise else None


def read_layouts(
    params: PyTree, fn: Callable[..., Any], args: Sequence[Any], fan_in_fan_out: bool = False
) -> Mapping[str, Layout | Ambiguous]:
    """The layout of every leaf that ``fn(params, *args)`` uses as the matrix of a product, by its path.

    The arguments are those of `read_program`, of whose result this is a part.
    """
    return read_program(params, fn, args, fan_in_fan_out).matrices


def read_program(params: PyTree, fn: Callable[..., Any], args: Sequence[Any], fan_in_fan_out: bool = False) -> Program:
    """Read ``fn(params, *args)`` for axes of matrices and of stacked vectors, and for the matrix of each bias.

    A leaf that is looked up has its rows as inputs. A leaf that is used both as it is and transposed has the side
    that the framework's convention says.

    Args:
        params: Any pytree of arrays; quantized and adapted leaves have their layouts already.
        fn: The function that uses them.
        args: The rest of its arguments; arrays, or shapes as ``jax.ShapeDtypeStruct``.
        fan_in_fan_out: As in `conventional_layout`.

    Returns:
        Layouts; for a matrix whose uses contradict each other, the uses; for a bias the path of its matrix.
    """
    found = named_leaves(params, is_leaf=is_weight)
    notes: dict[str, _Note] = {}
    for path, leaf in found.items():
        if not is_weight(leaf) and getattr(leaf, "ndim", 0) > 1:
            notes[path] = _Note([])

    def probed(key_path: KeyPath, leaf: PyTree) -> PyTree:
        if dotted(key_path) not in notes:
            return leaf
        return Probe(leaf, leaf.ndim, tuple(range(leaf.ndim)))

    tree = jax.tree_util.tree_map_with_path(probed, params, is_leaf=is_weight)
    leaves, treedef = jax.tree.flatten(((tree, *args), {}), is_leaf=is_weight)
    program, values, _ = trace(fn, leaves, treedef)
    jaxpr = compat.without_dead_code(program)
    watches = iter(notes.values())
    views = [_view(value, watches) for value in values]
    jax.eval_shape(lambda views: evaluate(jaxpr, *views), views)
    paths: list[str | None] = []  # for each input of the program that of the leaf in params
    for key_path, leaf in jax.tree_util.tree_leaves_with_path((tree, *args), is_leaf=is_weight):
        if is_weight(leaf) or compat.is_array(leaf):
            argument, *rest = key_path
            paths.append(dotted(tuple(rest)) if argument.idx == 0 else None)
    _separate_members(jaxpr, paths, notes)
    matrices: dict[str, Layout | Ambiguous] = {}
    vectors: dict[str, Layout] = {}
    for path, note in notes.items():
        convention = conventional_layout(path, found[path].shape, fan_in_fan_out)
        is_lookup = convention is not None and convention.lookup
        columns = _by_columns(note.uses, convention)
        vector = None if is_lookup else note.vector()
        if columns is not None:
            matrices[path] = columns
        elif vector is not None:
            after = _index_after(path, vector.layers, ())
            vectors[path] = Layout(vector.layers, (), vector.rest, index_after=after, source=READ)
        elif note.uses:
            uses = note.uses if convention is not None else [*note.uses, *note.of_one_input]
            settled = _settled(path, uses, convention)
            if isinstance(settled, Layout) and len(note.kernels) == 1:
                settled = _of_kernel(settled, *next(iter(note.kernels)))
            matrices[path] = settled
    merges = {path: frozenset(note.merges) for path, note in notes.items()}
    return Program(matrices, vectors, read_biases(jaxpr, paths), Reading(jaxpr, paths, merges))


def _separate_members(jaxpr: ClosedJaxpr, paths: Sequence[str | None], notes: Mapping[str, _Note]) -> None:
    """Make the first axis of a leaf that counts members of an ensemble a stacked one in its uses."""
    candidates = []
    for path, note in notes.items():
        if note.uses and all(0 in use.out and len(use.out) > 1 and use.inp and not use.looks_up for use in note.uses):
            candidates.append(path)
    for path in leaves_of_members(jaxpr, paths, candidates):
        uses = notes[path].uses
        uses[:] = [use._replace(stack=(0, *use.stack), out=use.out[1:], batched=(0, *use.batched)) for use in uses]


def _view(value: Value, watches: Iterator[_Note]) -> Value:
    if isinstance(value, Probe):
        return View.of(value, next(watches))
    return View.of(value) if is_weight(value) else value


def _without(axes: Iterable[int], gone: Collection[int]) -> tuple[int, ...]:
    """The axes but those that are gone, in order."""
    return tuple(axis for axis in axes if axis not in gone)


def _in_order(axes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(axes))


def _settled(path: str, uses: Sequence[Use], convention: Layout | None) -> Layout | Ambiguous:
    """The one layout that all uses agree with."""
    uses = [use for use in uses if use.inp and use.out]
    if not uses:  # axes of length 1 leave no trace in a product
        return convention or Ambiguous("its axes of length 1 do not tell what they are")
    uses = [use for use in uses if not _is_choice(use, uses)]
    descriptions = tuple(map(_words, dict.fromkeys(uses)))
    by_input = {use.inp: use for use in reversed(uses)}  # of several like it the first
    lookups = [use for use in uses if use.looks_up]
    if any(use.inp == (0,) and len(use.out) > 1 for use in lookups):
        return Ambiguous("its first axis is looked up, which may be a choice of layers or of rows", descriptions)
    sides = {(use.stack, frozenset((use.inp, use.out))) for use in uses}
    if len(sides) > 1 or any(set(use.inp) & set(use.out) for use in uses):
        return Ambiguous("the program uses its axes in more than one way", descriptions)
    if lookups:
        first = lookups[0]
    elif len(by_input) == 1:
        first = uses[0]
    elif convention is None or convention.inp not in by_input:
        return Ambiguous("the program uses it both as it is and transposed", descriptions)
    else:
        first = by_input[convention.inp]
    layered = set[int]()
    for use in uses:
        layered |= set(use.stack) - set(use.batched)
    after = _index_after(path, first.stack, _without(first.stack, layered))
    rows, multiplied = bool(lookups), len(lookups) < len(uses)
    return Layout(first.stack, first.inp, first.out, rows, after, READ, multiplied=multiplied)


def _by_columns(uses: Sequence[Use], convention: Layout | None) -> Layout | None:
    """The layout of a matrix of which all products take one column, ``x @ w[:, i]``; None of others.

    Of ``x @ w[i]`` only the convention says whether it takes a row of a matrix or a vector of a stack.
    """
    if convention is None or not uses:
        return None
    for use in uses:
        if (use.inp, use.stack, use.out) != (convention.inp, convention.out, ()) or use.looks_up or use.batched:
            return None
    return dataclasses.replace(convention, source=READ)


def _is_choice(use: Use, uses: Sequence[Use]) -> bool:
    """Whether a lookup is a choice of matrices of a stack, by which the program multiplies then."""
    if not use.looks_up or len(use.out) < 2:
        return False
    return any(set(use.inp) <= set(other.stack) for other in uses if not other.looks_up)


def _of_kernel(layout: Layout, taps: tuple[int, ...], groups: int) -> Layout:
    """The layout with positions in a kernel, those of length 1 too, among the inputs."""
    if not set(taps) <= {*layout.inp, *layout.out}:
        return layout
    inp, out = _in_order({*layout.inp, *taps}), _without(layout.out, taps)
    if not out:
        return layout
    return dataclasses.replace(layout, inp=inp, out=out, taps=taps, groups=groups)


def _words(use: Use) -> str:
    """A use as a message says it."""
    lookup = ", looked up" if use.looks_up else ""
    return f"stack={use.stack}, inp={use.inp}, out={use.out}{lookup}"


def _index_after(path: str, stack: Sequence[int], batched: Collection[int]) -> tuple[str, ...]:
    """Path components after which the indices of stacked axes go; ``""`` for those in front of the whole path.

    A layer's index follows the name of the list of layers, or the first component if another one is left after it.
    Where the path has an index of its own, and for axes that are batches of a product and no layers, it is in front.
    """
    parts = module_path(path).split(".")
    is_numbered = any(part.isdigit() for part in parts[1:])
    lists = [name for name in LISTS if _is_unnumbered(name, parts)][:1]
    layers = len(stack) - len(batched)
    if layers > len(lists) and not is_numbered:
        lists = parts[: min(layers, len(parts) - 1)]
    names = iter([*[""] * (layers - len(lists)), *lists][:layers])
    after = []
    for axis in stack:
        after.append("" if axis in batched else next(names))
    return tuple(after)


def _is_unnumbered(name: str, parts: Sequence[str]) -> bool:
    """Whether a path has a component of this name that no index follows."""
    if name not in parts:
        return False
    following = parts[parts.index(name) + 1 :]
    return not following or not following[0].isdigit()
