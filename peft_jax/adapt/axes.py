"""Which axes of each leaf are inputs, outputs and stacked layers, read off the program that uses the leaves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.view import Atom, View
from peft_jax.core.layout import Ambiguous, Layout, conventional_layout
from peft_jax.core.paths import dotted
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.weight import Change, Weight, is_weight


class Use(NamedTuple):
    """A product that a leaf takes part in: its axes by their role in it."""

    stack: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]
    looks_up: bool


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("shape", "dtype", "whole", "labels"))
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
    """Stands for a leaf of unknown axes: any axis may be a stacked one, none an input.

    Attributes:
        shape: Shape by now.
        dtype: Element type.
        whole: Shape of the leaf.
        labels: Which axis of the leaf each axis is; those that are missing were stacked layers.
    """

    shape: tuple[int, ...] = ()  # type: ignore[assignment]
    dtype: Any = jnp.float32  # type: ignore[assignment]
    whole: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        """All axes are stacked."""
        axes = tuple(range(len(self.shape)))
        return Layout(stack=axes, inp=(), out=(), index_after=("",) * len(axes))

    @property
    def array(self) -> Any:
        """Nothing but a shape."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def dense(self) -> jax.Array:
        """Zeros: only shapes are evaluated."""
        return jnp.zeros(self.shape, self.dtype)

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """A leaf without inputs has no product."""
        raise NotImplementedError

    def astype(self, dtype: jnp.dtype) -> "Probe":
        """The leaf in another element type."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Probe":
        """The leaf without an axis, or with a part of it."""
        if drop:
            left = [i for i in range(len(self.shape)) if i != position]
            shape, labels = (tuple(row[i] for i in left) for row in (self.shape, self.labels))
            return dataclasses.replace(self, shape=shape, labels=labels)
        return dataclasses.replace(self, shape=jax.eval_shape(lambda: change(self.dense(), position)).shape)

    def specs(self, entries: tuple[Any, ...]) -> Any:
        """It has no arrays."""
        return self

    def use(self, contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> Use:
        """A product over some digits, in terms of the leaf's axes."""
        inp = tuple(sorted({self.labels[atom.axis] for atom in contracted if atom.axis >= 0}))
        kept = {self.labels[atom.axis] for atom in stacked if atom.axis >= 0}
        single = {label for label, n in zip(self.labels, self.shape, strict=True) if n == 1 < self.whole[label]}
        stack = tuple(i for i in range(len(self.whole)) if i not in self.labels or i in kept or i in single)
        out = tuple(i for i in range(len(self.whole)) if i not in (*stack, *inp))
        return Use(stack, inp, out, looks_up)


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the products of one leaf."""

    uses: list[Use]

    def product(self, view: View, contracted: frozenset[Atom], stacked: frozenset[Atom], looks_up: bool) -> None:
        assert isinstance(view.weight, Probe)
        self.uses.append(view.weight.use(contracted, stacked, looks_up))

    def done(self, eqn: Any, merged: bool) -> None:
        pass


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
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
    notes = {dotted(path): _Note([]) for path, leaf in found if not is_weight(leaf) and getattr(leaf, "ndim", 0) > 1}

    def probed(key_path: Any, leaf: Any) -> Any:
        if dotted(key_path) not in notes:
            return leaf
        return Probe(leaf.shape, jnp.dtype(leaf.dtype), leaf.shape, tuple(range(leaf.ndim)))

    tree = jax.tree_util.tree_map_with_path(probed, params, is_leaf=is_weight)
    leaves, treedef = jax.tree.flatten(((tree, *args), {}), is_leaf=is_weight)
    jaxpr, values, _ = trace(fn, leaves, treedef)
    watches = iter(notes.values())
    views = [_view(value, watches) for value in values]
    jax.eval_shape(lambda views: evaluate(jaxpr, *views), views)
    read = {}
    for path, leaf in found:
        if (name := dotted(path)) in notes and notes[name].uses:
            convention = conventional_layout(name, leaf.shape, fan_in_fan_out)
            read[name] = _settled(name, notes[name].uses, convention)
    return read


def _view(value: Any, watches: Any) -> Any:
    if isinstance(value, Probe):
        return View.of(value, next(watches))
    return View.of(value) if is_weight(value) else value


def _settled(path: str, uses: Sequence[Use], convention: Layout | None) -> Layout | Ambiguous:
    """The one layout that all uses agree with."""
    source = "read off the program"
    rows = [use for use in uses if use.looks_up]
    sides = {(use.stack, frozenset((use.inp, use.out))) for use in uses}
    if len(sides) > 1 or not all(use.inp and use.out for use in uses) or any(set(u.inp) & set(u.out) for u in uses):
        return Ambiguous("the program uses its axes in more than one way", tuple(map(_words, dict.fromkeys(uses))))
    first = rows[0] if rows else uses[0]
    turned = {use.inp for use in uses if not use.looks_up}
    if not rows and len(turned) > 1:
        if convention is None or convention.inp not in turned:
            told = tuple(map(_words, dict.fromkeys(uses)))
            return Ambiguous("the program uses it both as it is and transposed", told)
        first = next(use for use in uses if use.inp == convention.inp)
    after = _index_after(path, len(first.stack))
    return Layout(first.stack, first.inp, first.out, lookup=bool(rows), index_after=after, source=source)


def _words(use: Use) -> str:
    return f"stack={use.stack}, inp={use.inp}, out={use.out}" + (", looked up" if use.looks_up else "")


def _index_after(path: str, stacked: int) -> tuple[str, ...]:
    """Path components after which the indices of stacked axes go: ``layers`` if it is there, else from the front on."""
    parts = path.split(".")
    front = ["layers", *(part for part in parts if part != "layers")] if "layers" in parts else parts
    return tuple(front[min(i, len(front) - 1)] for i in range(stacked))
