"""Which tensors of a file an adapter's leaf has: their keys, shapes and axes."""

import itertools
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
from peft_jax.interop.extras import is_transposed
from peft_jax.interop.formats import (
    CONVOLUTIONS,
    EXPERTS,
    FUSED,
    INNER,
    INSIDE,
    ONE,
    ONES,
    PREFIX,
    PREFIXES,
    ROWS,
    SHARED,
    TAPS,
    TOKEN_SUFFIX,
    Row,
    tensor_key,
)

from peft_jax.adapters.plan import Target
from peft_jax.adapters.target_parameters import depth, parameters_of
from peft_jax.core.leaves import Leaf
from peft_jax.core.selecting import picked
from peft_jax.methods.base import Method
from peft_jax.methods.own_tensors import OwnTensors
from peft_jax.methods.roles import BIAS, Whole
from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.trainable_tokens import Tokens, tokens_shape


class Entry(NamedTuple):
    """One tensor of a file: its key, and whose it is: ``layer`` of our array ``role``, ``shape`` unpadded.

    A slice in ``layer`` takes all experts of a parameter, which are the first axis of ``shape`` then. ``order`` has for
    each of the file's axes those of ours that it is made of: mostly one, none if we have not its length of 1.
    """

    key: str
    layer: tuple[int | slice, ...]
    role: str
    shape: tuple[int, ...]
    order: tuple[tuple[int, ...], ...]
    split: tuple[int, ...] = ()  # the shape with a convolution's input axes apart, if that is what ``order`` counts

    @property
    def parts(self) -> tuple[int, ...]:
        """The shape whose axes ``order`` counts."""
        return self.split or self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        shape = list[int]()
        for axes in self.order:
            shape.append(math.prod(picked(self.parts, axes)))
        return tuple(shape)

    @property
    def place(self) -> tuple[slice, ...]:
        """The unpadded part of the array of `layer`."""
        return tuple(map(slice, self.shape))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Our array, without padding, as the file has it."""
        turned = np.transpose(array.reshape(self.parts), list(itertools.chain(*self.order)))
        return np.ascontiguousarray(turned.reshape(self.tensor_shape))

    def from_file(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_file`."""
        axes = list(itertools.chain(*self.order))
        turned = np.transpose(tensor.reshape(picked(self.parts, axes)), np.argsort(axes))
        return turned.reshape(self.shape)


def entries_of(
    target: Target, config: Method, adapted: Collection[str], biased: Collection[str] = ()
) -> Iterator[Entry]:
    """The tensors that a leaf's adapter has in a file.

    Args:
        target: The leaf.
        config: The adapter's config.
        adapted: Names of all modules with the method's arrays.
        biased: Names of those whose bias the adapter changes too.
    """
    leaf, role, layers = target.leaf, target.role, target.adapted
    parameters = parameters_of([leaf], config)
    for index in zip(*np.nonzero(layers), strict=True) if layers.ndim else [()]:
        name = str(leaf.names[index])
        if role is None and name in parameters:
            if not any(picked(index, leaf.layout.unnamed)):
                yield from _parameter_entries(target, config, adapted, index)
        elif role is None:
            yield from _matrix_entries(leaf, config, name, index, biased=name in biased)
        elif isinstance(role, Tokens):
            n_in, n_out = leaf.layout.sizes(leaf.value.shape)
            shapes = tokens_shape(role.tokens, name, n_in, n_out, lookup=leaf.layout.lookup)
            for array, shape in shapes.items():
                yield Entry(f"{PREFIX}{name}.{TOKEN_SUFFIX}", index, array, shape, ((0,), (1,)))
        elif isinstance(role, Whole):
            yield _whole_entry(leaf, role, config, adapted, index)


def _matrix_entries(leaf: Leaf, config: Method, name: str, index: tuple[int, ...], *, biased: bool) -> Iterator[Entry]:
    """Those of a target module's matrix, in one layer."""
    shapes = config.leaf_shapes(name, leaf.layout, leaf.value.shape)
    if isinstance(config, OwnTensors):
        for role, shape in shapes.items():
            yield Entry(config.tensor_key(role), index, role, shape, tuple((axis,) for axis in range(len(shape))))
        return
    is_convolution = leaf.layout.taps and config.peft_type in CONVOLUTIONS
    for row in _rows(config, leaf):
        if row.role not in shapes or not config.has_array(row.role, biased=biased):
            continue
        key = tensor_key(config.peft_type, name, row.suffix)
        ours, shape = config.axes[row.role], shapes[row.role]
        if is_convolution:
            yield Entry(key, index, row.role, shape, *_convolution(leaf, row, ours, shape))
        else:
            yield Entry(key, index, row.role, shape, _order(row, ours))


def _whole_entry(leaf: Leaf, role: Whole, config: Method, adapted: Collection[str], index: tuple[int, ...]) -> Entry:
    """That of a leaf that is trained whole, in one layer."""
    name = str(leaf.names[index])
    inside = INSIDE[role.name]
    if role.name == BIAS and name not in adapted and f"{name}.weight" not in adapted:
        inside = ""
    key = f"{PREFIXES.get(config.peft_type, PREFIX)}{name}{inside}.{leaf.torch_name}"
    n_in, n_out = leaf.layout.sizes(leaf.value.shape)
    shape = (n_in, n_out) if leaf.layout.inp else (n_out,)
    if leaf.layout.taps:
        row = Row(role.name, "", ("out", "in", TAPS))
        return Entry(key, index, role.name, shape, *_convolution(leaf, row, ("in", "out"), shape))
    order = tuple((axis,) for axis in range(len(shape)))
    return Entry(key, index, role.name, shape, order[::-1] if is_transposed(leaf, config) else order)


def _parameter_entries(
    target: Target, config: Method, adapted: Collection[str], index: tuple[int, ...]
) -> Iterator[Entry]:
    """Those of a parameter, all of whose experts are in one tensor."""
    leaf, name = target.leaf, str(target.leaf.names[index])
    unnamed = leaf.layout.unnamed
    layer = tuple(slice(None) if i in unnamed else n for i, n in enumerate(index))
    experts = picked(target.adapted.shape, unnamed)
    module = name.rpartition(".")[0] + INNER * depth(config, name, set(adapted))
    shapes = config.shapes(name, *leaf.layout.sizes(leaf.value.shape), lookup=False)
    for row in FUSED[config.peft_type] if unnamed else _rows(config, leaf):
        if row.role in shapes:
            ours = ((EXPERTS,) if unnamed else ()) + config.axes[row.role]
            key = tensor_key(config.peft_type, module, row.suffix)
            yield Entry(key, layer, row.role, (*experts, *shapes[row.role]), _order(row, ours))


def _order(row: Row, ours: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Which of our axes make each axis of the tensor."""
    order = list[tuple[int, ...]]()
    for part in row.axes:
        axes = (part,) if isinstance(part, str) else part
        order.append(tuple(ours.index(axis) for axis in axes if axis != ONE))
    return tuple(order)


def _convolution(
    leaf: Leaf, row: Row, ours: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """``order`` and ``split`` of an array of a convolution's kernel, ``shape`` by axes ``ours``.

    The axis in front of the positions in the file has them in its array, flattened after the channels.
    """
    taps = picked(leaf.value.shape, leaf.layout.taps)
    first, split = len(ours), shape
    if TAPS in row.axes:
        first = ours.index(str(row.axes[row.axes.index(TAPS) - 1]))
        split = (*shape[:first], shape[first] // math.prod(taps), *taps, *shape[first + 1 :])
    order: list[tuple[int, ...]] = []
    for axis in row.axes:
        if axis == TAPS:
            for number in range(len(taps)):
                order.append((first + 1 + number,))
        elif axis == ONES:
            order += [()] * len(taps)
        elif axis == ONE:
            order.append(())
        else:
            at = ours.index(str(axis))
            order.append((at + len(split) - len(shape) if at > first else at,))
    return tuple(order), split


def shared_entries(config: Method, sizes: list[tuple[int, int]]) -> list[Entry]:
    """The tensors that a file has once for all layers."""
    if not (isinstance(config, SharedArrays) and config.saves_shared):
        return []
    shapes, entries = config.shared_shapes(sizes), list[Entry]()
    for row in SHARED[config.peft_type]:
        entries += entries_of_shared(config, row, shapes[row.role])
    return entries


def entries_of_shared(config: SharedArrays, row: Row, shape: tuple[int, ...]) -> list[Entry]:
    """The tensors of an array of this shape that all layers share: one, or one for each place of its first axis."""
    axes = config.shared_axes[row.role]
    if "{}" not in row.suffix:
        return [Entry(row.suffix, (), row.role, shape, _order(row, axes))]
    count, *rest = shape
    order = _order(row, axes[1:])
    return [Entry(row.suffix.format(number), (number,), row.role, tuple(rest), order) for number in range(count)]


def _rows(config: Method, leaf: Leaf) -> tuple[Row, ...]:
    rows = ROWS[config.peft_type]
    if leaf.layout.taps and config.peft_type in CONVOLUTIONS:
        return CONVOLUTIONS[config.peft_type]
    if leaf.layout.lookup not in rows:
        kind = "embedding" if leaf.layout.lookup else "matrix that is not looked up"
        raise ValueError(f"PEFT has no {config.peft_type} for an {kind}, as '{leaf.path}' is. Target other modules.")
    return rows[leaf.layout.lookup]
