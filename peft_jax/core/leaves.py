"""The leaves of a tree with their layouts and the names of the layers that they stand for."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.bounded_regex import compiled
from peft_jax.core.layout import CONVENTION, VECTOR_NAMES, Ambiguous, Layout, conventional_layout
from peft_jax.core.paths import TORCH_NAMES, leaf_names, module_path, named_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import is_weight

Layouts = Mapping[str, Layout]

WEIGHT_NAMES = ("w", "weights", "embeddings")  # what libraries call the weight of a module beside Flax and PyTorch


class Program(NamedTuple):
    """Facts about leaves that are read off a program, by path.

    Attributes:
        matrices: Axes of those that are the matrix of a product, or why they are unclear.
        vectors: Axes of stacked leaves one layer of which is a vector, and of those that are multiplied elementwise.
        biases: Paths of the matrices to whose products the leaves are added.
        reading: The program itself and where it was not followed, for `peft_jax.adapt.left_out`.
    """

    matrices: Mapping[str, Layout | Ambiguous] = MappingProxyType({})
    vectors: Mapping[str, Layout] = MappingProxyType({})
    biases: Mapping[str, str] = MappingProxyType({})
    reading: Any = None


class Leaf(NamedTuple):
    """A leaf with its layout and the names of the layers it stands for; no layout where it is ambiguous."""

    path: str
    value: Any
    layout: Any  # a Layout or None: `required_layout` tells type checkers which
    names: np.ndarray
    unclear: Ambiguous | None = None

    @property
    def modules(self) -> list[str]:
        """Names of the modules that its layers belong to, stacked axes flattened."""
        modules: list[str] = self.names.ravel().tolist()
        return modules

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a matrix, or called one."""
        is_known = self.layout is not None and self.layout.bias_of is not None
        return is_known or self.path.rsplit(".", 1)[-1] == "bias"

    @property
    def torch_name(self) -> str:
        """PyTorch's name of the leaf in its module; a leaf that no convention names is its module's weight."""
        return "bias" if self.is_bias else TORCH_NAMES.get(self.path.rsplit(".", 1)[-1], "weight")

    def required_layout(self) -> Layout:
        """The layout.

        Raises:
            ValueError: if it is ambiguous.
        """
        if self.layout is None:
            unclear, hint = self.unclear, ""
            if unclear is None:
                unclear = Ambiguous("no convention names the axes of such a leaf")
                hint = ", or give fn= and args= to have the axes read off the program that uses it"
            found = f" ({'; '.join(unclear.found)})" if unclear.found else ""
            raise ValueError(
                f"Leaf '{self.path}' of shape {self.value.shape} is a target, and its input and output axes are "
                f"ambiguous: {unclear.why}{found}. "
                f"Write layout={{r'{re.escape(self.path)}': pj.Layout(stack=..., inp=..., out=...)}}{hint}."
            )
        layout: Layout = self.layout
        return layout


def module_names(leaves: Iterable[Leaf]) -> list[str]:
    """Names of the modules that the layers of some leaves belong to, leaf by leaf."""
    modules: list[str] = []
    for leaf in leaves:
        modules += leaf.modules
    return modules


def find_leaves(
    params: PyTree,
    layouts: Layouts | None,
    fan_in_fan_out: bool = False,
    read: Program | None = None,
) -> list[Leaf]:
    """All leaves of a tree, in order, with their layouts.

    Args:
        params: The tree.
        layouts: Layouts that the user gives, by regex over whole paths; they come first.
        fan_in_fan_out: As in `conventional_layout`; conventions come last.
        read: Facts that were read off a program, where one is given.

    Raises:
        ValueError: if a layout does not fit its leaf, or fits none; or two leaves have one path.
    """
    unused = set(layouts or {})
    known = {} if read is None else {**read.vectors, **read.matrices}
    found = []
    for path, value in named_leaves(params, is_leaf=is_weight).items():
        shape = getattr(value, "shape", ())
        layout: Layout | Ambiguous | None
        if path in known:
            layout = known[path]
        elif is_weight(value):
            layout = value.layout
        else:
            layout = conventional_layout(path, shape, fan_in_fan_out)
        for pattern, given in (layouts or {}).items():
            if compiled(pattern, "a key of layout").fullmatch(path):
                given.check(shape, path)
                if is_weight(value) and value.layout.unnamed:  # adapted as target_parameters, without experts' names
                    given = dataclasses.replace(given, index_after=value.layout.index_after)
                if is_weight(value) and given != layout:
                    raise ValueError(
                        f"Leaf '{path}' is quantized or adapted already, with the axes of {layout}. "
                        f"Give {given} to the call that made it so, or leave layout= out here."
                    )
                layout = given
                unused.discard(pattern)
                break
        unclear = None
        if isinstance(layout, Ambiguous):
            unclear, layout = layout, None
        elif layout is None and read is not None:
            unclear = Ambiguous("no convention names the axes of such a leaf, nor does a product in fn=")
        if layout is None:
            names = np.array(module_path(path), dtype=object)
        else:
            names = leaf_names(path, layout, shape)
        found.append(Leaf(path, value, layout, names, unclear))
    if unused:
        raise ValueError(
            f"layout patterns {sorted(unused)} match no leaf; a pattern is matched against the whole path. "
            f"Paths: {[leaf.path for leaf in found][:5]}."
        )
    return _with_biases(found, None if read is None else read.biases)


def _with_biases(found: Sequence[Leaf], read: Mapping[str, str] | None) -> list[Leaf]:
    """The leaves, each bias with the names of its matrix and, where its own axes are unclear, with that one's outputs.

    Args:
        found: The leaves.
        read: For each leaf that a program adds to the product with a matrix the path of that; None without a program.
    """
    by_path: dict[str, Leaf] = {}
    beside: dict[str, set[str]] = {}
    for leaf in found:
        by_path[leaf.path] = leaf
        if is_matrix(leaf):
            beside.setdefault(leaf.path.rpartition(".")[0], set()).add(leaf.path)
    leaves = []
    for leaf in found:
        if is_float(leaf) and not is_weight(leaf.value):
            siblings = beside.get(leaf.path.rpartition(".")[0], set()) - {leaf.path}
            matrix = _matrix_of(leaf.path, siblings, read)
            if matrix is not None:
                leaf = _as_bias(leaf, by_path[matrix])
        leaves.append(leaf)
    return leaves


def _matrix_of(path: str, siblings: Collection[str], read: Mapping[str, str] | None) -> str | None:
    """The path of the matrix that a leaf is the bias of, if it is a bias.

    The program says so. Without one, the bias is ``b`` beside the only matrix of a module, or ``b1`` beside ``w1``;
    ``bias`` beside the only matrix is one in any case.

    Args:
        path: Path of the leaf.
        siblings: Paths of the matrices beside it.
        read: As of `_with_biases`.
    """
    parent, dot, name = path.rpartition(".")
    if read is not None:
        if path in read:
            return read[path]
        return next(iter(siblings)) if len(siblings) == 1 and name == "bias" else None
    if len(siblings) == 1 and name in ("bias", "b"):
        return next(iter(siblings))
    numbered = f"{parent}{dot}w{name[1:]}"
    return numbered if name.startswith("b") and numbered in siblings else None


def _as_bias(leaf: Leaf, matrix: Leaf) -> Leaf:
    """The leaf as the bias of a matrix, if it has its stacked axes and its outputs."""
    if matrix.layout is None:
        return leaf
    stack = matrix.layout.stack_shape(matrix.value.shape)
    _, n_out = matrix.layout.sizes(matrix.value.shape)
    layout, shape = leaf.layout, leaf.value.shape
    if layout is None or layout.source.startswith(CONVENTION):
        depth = len(stack) if shape[: len(stack)] == stack else 0
        axes = tuple(range(len(shape)))
        layout = Layout(axes[:depth], (), axes[depth:], source=f"{CONVENTION} for a bias of '{matrix.path}'")
    if layout.inp or layout.stack_shape(shape) != stack or layout.sizes(shape)[1] != n_out:
        if leaf.layout is not None:
            return leaf
        why = f"it is no bias of '{matrix.path}', which has the stacked axes {stack} and {n_out} outputs"
        return leaf._replace(names=matrix.names, unclear=Ambiguous(why))
    common = os.path.commonprefix([leaf.path, matrix.path])
    ends = (leaf.path[len(common) :], matrix.path[len(common) :])
    layout = dataclasses.replace(layout, index_after=matrix.layout.index_after, bias_of=ends)
    return leaf._replace(layout=layout, names=matrix.names, unclear=None)


def own_names(found: Sequence[Leaf]) -> dict[str, list[str]]:
    """For leaves whose modules have other names than their own paths the names of the modules, by the paths.

    A stacked leaf's path has no index; the only matrix of a module may be called by the module, and at the top by
    itself. Haiku's paths have slashes, whose parts count like those between dots.
    """
    matrices = [leaf for leaf in found if is_matrix(leaf)]
    inside = Counter[str]()  # the number of matrices in each module, at any depth
    for leaf in matrices:
        inside.update(_parents(leaf.path))
    own: dict[str, list[str]] = {}
    for leaf in matrices:
        names = leaf.modules
        parent, _, last = leaf.path.rpartition(".")
        aliases = {leaf.path, module_path(leaf.path)}
        if last in WEIGHT_NAMES or inside[parent] == 1:
            aliases.add(parent)
        aliases |= {alias.replace("/", ".") for alias in aliases}
        for alias in sorted(aliases - {""} - set(names)):
            own.setdefault(alias, []).extend(names)
    return own


def _parents(path: str) -> list[str]:
    """The paths of all modules around a leaf."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def replace_leaves(params: PyTree, nodes: Mapping[int, PyTree]) -> PyTree:
    """``params`` with other nodes at some positions of `find_leaves`."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
    for position, node in nodes.items():
        leaves[position] = node
    return jax.tree.unflatten(treedef, leaves)


def is_float(leaf: Leaf) -> bool:
    """Whether a leaf stands for floating-point numbers."""
    return bool(jnp.issubdtype(getattr(leaf.value, "dtype", None) or bool, jnp.floating))


def is_matmul(leaf: Leaf) -> bool:
    """Whether a leaf is the weight of a product, which ``"all-linear"`` means, or may be once its axes are given."""
    return is_matrix(leaf) and (leaf.layout is None or leaf.layout.is_linear)


def is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is seen as a matrix, or may be once its axes are given."""
    if not is_float(leaf):
        return False
    if leaf.layout is None:
        return getattr(leaf.value, "ndim", 0) > 1 and leaf.path.rsplit(".", 1)[-1] not in VECTOR_NAMES
    return bool(leaf.layout.inp)
