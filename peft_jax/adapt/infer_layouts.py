"""Which axes of each leaf are inputs, outputs and stacked layers, read off the program that uses the leaves."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.biases import read_biases
from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.view import Atom, View
from peft_jax.core.layout import LISTS, READ, Ambiguous, Layout, conventional_layout
from peft_jax.core.leaves import Program
from peft_jax.core.paths import dotted, module_path, named_leaves
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.weight import Change, Weight, is_weight


class Use(NamedTuple):
    """A product that a leaf takes part in: its axes by their role in it; ``batched`` are those that the product stacks.

    The other stacked axes are layers: a loop sliced them, or one of them was taken.
    """

    stack: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]
    looks_up: bool
    batched: tuple[int, ...] = ()


class Touch(NamedTuple):
    """Any use of a leaf: which of its axes were layers, which are left, and whether it was multiplied elementwise."""

    layers: tuple[int, ...]
    rest: tuple[int, ...]
    elementwise: bool


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
        layers, _ = self.sliced()
        return Use(stack, inp, out, looks_up, tuple(i for i in stack if i not in layers))

    def sliced(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leaf's axes that are layers of it, by a loop or a choice, and its other axes."""
        layers = tuple(i for i in range(self.ndims) if i not in self.labels or i in self.cut)
        return layers, tuple(i for i in range(self.ndims) if i not in layers)


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the products of one leaf, and all its uses."""

    uses: list[Use]
    touches: list[Touch] = dataclasses.field(default_factory=list)
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

    def done(self, view: View, eqn: Any, merged: bool) -> None:
        assert isinstance(view.weight, Probe)
        is_product = eqn is not None and eqn.primitive.name == "dot_general"
        elementwise = is_product and not eqn.params["dimension_numbers"][0][0]
        self.touches.append(Touch(*view.weight.sliced(), elementwise))

    def inside(self, eqn: Any) -> "_Note":
        return self

    def vector(self) -> Touch | None:
        """One of the uses, if by all of them one layer of the leaf is a vector: it has one axis, or takes no inputs."""
        if any(use.inp and use.out for use in self.uses) or len({touch.layers for touch in self.touches}) != 1:
            return None
        has_one_axis = all(touch.layers and len(touch.rest) < 2 for touch in self.touches)
        is_elementwise = all(touch.elementwise for touch in self.touches)
        return self.touches[0] if has_one_axis or is_elementwise else None


def read_layouts(
    params: Any, fn: Callable[..., Any], args: Sequence[Any], fan_in_fan_out: bool = False
) -> Mapping[str, Layout | Ambiguous]:
    """The layout of every leaf that ``fn(params, *args)`` uses as the matrix of a product, by its path.

    The arguments are those of `read_program`, of whose result this is a part.
    """
    return read_program(params, fn, args, fan_in_fan_out).matrices


def read_program(params: Any, fn: Callable[..., Any], args: Sequence[Any], fan_in_fan_out: bool = False) -> Program:
    """What ``fn(params, *args)`` tells of its leaves: axes of matrices and of stacked vectors, and whose bias is which.

    A leaf that is looked up has its rows as inputs. A leaf that is used both as it is and transposed has the side
    that the framework's convention says.

    Args:
        params: Any pytree of arrays; quantized and adapted leaves have their layouts already.
        fn: The function that uses them.
        args: The rest of its arguments; arrays, or shapes as ``jax.ShapeDtypeStruct``.
        fan_in_fan_out: As in `conventional_layout`.

    Returns:
        Layouts, for a matrix whose uses contradict each other what they are, and for a bias the path of its matrix.
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
    matrices: dict[str, Layout | Ambiguous] = {}
    vectors: dict[str, Layout] = {}
    for name, leaf in found.items():
        if name not in notes:
            continue
        convention = conventional_layout(name, leaf.shape, fan_in_fan_out)
        vector = None if convention is not None and convention.lookup else notes[name].vector()
        if vector is not None:
            after = _index_after(name, vector.layers, ())
            vectors[name] = Layout(vector.layers, (), vector.rest, index_after=after, source=READ)
        elif notes[name].uses:
            settled = _settled(name, notes[name].uses, convention)
            kernel = next(iter(notes[name].kernels)) if len(notes[name].kernels) == 1 else ((), 1)
            matrices[name] = _of_kernel(settled, *kernel) if isinstance(settled, Layout) else settled
    inputs = jax.tree_util.tree_leaves_with_path((tree, *args), is_leaf=is_weight)
    traced = [path for path, leaf in inputs if is_weight(leaf) or compat.is_array(leaf)]
    paths = [dotted(path[1:]) if path[0].idx == 0 else None for path in traced]
    return Program(matrices, vectors, read_biases(jaxpr, paths))


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
    layered = {axis for use in uses for axis in use.stack if axis not in use.batched}
    after = _index_after(path, first.stack, [axis for axis in first.stack if axis not in layered])
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


def _index_after(path: str, stack: Sequence[int], batched: Collection[int]) -> tuple[str, ...]:
    """Path components after which the indices of stacked axes go; ``""`` for those in front of the whole path.

    A layer's index follows the name of the list of layers, or the first component if another one is left after it.
    Where the path has an index of its own, and for axes that are batches of a product and no layers, it is in front.
    """
    parts = module_path(path).split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit() and i > 0]
    lists = [name for name in LISTS if name in parts and parts.index(name) + 1 not in numbered][:1]
    layers = len(stack) - len(batched)
    if layers > len(lists) and not numbered:
        lists = parts[: min(layers, len(parts) - 1)]
    names = iter([*[""] * (layers - len(lists)), *lists][:layers])
    after = ["" if axis in batched else next(names) for axis in stack]
    return tuple(after)
