"""Which axes of a leaf are stacked layers, inputs and outputs.

Every method sees one matrix ``(in, out)``; a layout says how a leaf of any rank is seen as that matrix.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from peft_jax.core.selecting import picked


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of a leaf by their role; each axis has exactly one role.

    Attributes:
        stack: Axes along which layers are stacked (as ``jax.lax.scan`` wants them), outermost first.
        inp: Input axes of the matrix, in the order in which they are flattened. Empty for vectors (biases, scales).
        out: Output axes of the matrix, in the order in which they are flattened.
        lookup: True for an embedding, whose rows are looked up by index.
        index_after: One name per stacked axis: the layer's index follows this component in module paths, as in
            ``model.layers.3.self_attn.q_proj`` for ``("layers",)``. None for the experts of one parameter, which
            have no names of their own (``target_parameters`` of a config). ``""`` puts it before the whole path,
            where no rule takes it for the index of a layer: ``1.model.layers.3.gate`` is that of expert 1.
        source: How the axes were found; only `peft_jax.explain` reads it.
        stored_in_out: Whether PyTorch stores the matrix as ``(in, out)``; None if ``fan_in_fan_out`` says.
        multiplied: Whether an embedding is the weight of a product too, as a tied head is: ``all-linear`` means it.
        parameter: Whether PyTorch's module is no linear layer, as that of a router or of fused experts: methods name
            such a weight by itself (``target_parameters``), and ``all-linear`` does not mean it.
        taps: Those of the input axes that are positions in the kernel of a convolution, in PyTorch's order. They are
            flattened after the channels, as there; files of some adapters have axes of their own for them.
        groups: Of how many groups of input channels the convolution is, each with a part of the output channels; the
            kernel has the inputs of one.
        numbers: The layers that a stack along the first stacked axis has, where these are not 0, 1, 2 and so on.
        stack_name: The name of the stack in the leaf's path, after that of ``index_after``, where layers of several
            shapes have a stack each; it is no part of the layers' names.
        bias_of: For a bias the ends of two paths, its own and that of the matrix to whose products it is added; what
            is before them is the same.

    Example:
        >>> heads = Layout(stack=(0,), inp=(1,), out=(2, 3))   # (layer, embed, head, feature)
        >>> heads.matrix(jnp.ones((2, 8, 4, 16))).shape
        (2, 8, 64)
    """

    stack: tuple[int, ...] = ()
    inp: tuple[int, ...] = (0,)
    out: tuple[int, ...] = (1,)
    lookup: bool = False
    index_after: tuple[str | None, ...] = ("layers",)
    source: str = dataclasses.field(default="told by layout=", compare=False, repr=False)
    stored_in_out: bool | None = dataclasses.field(default=None, compare=False, repr=False)
    multiplied: bool = dataclasses.field(default=False, compare=False, repr=False)
    parameter: bool = dataclasses.field(default=False, compare=False, repr=False)
    taps: tuple[int, ...] = dataclasses.field(default=(), compare=False, repr=False)
    groups: int = dataclasses.field(default=1, compare=False, repr=False)
    numbers: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    stack_name: str = dataclasses.field(default="", repr=False)
    bias_of: tuple[str, str] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Put a kernel's channels before its positions, as PyTorch flattens them: blocks and files count on it."""
        if self.taps and set(self.taps) <= set(self.inp):
            channels = tuple(axis for axis in self.inp if axis not in self.taps)
            object.__setattr__(self, "inp", (*channels, *self.taps))

    @property
    def is_linear(self) -> bool:
        """Whether the leaf is the weight of a product, not of lookups alone."""
        return (not self.lookup or self.multiplied) and not self.parameter

    @property
    def is_experts(self) -> bool:
        """Whether the leaf is the fused experts of a mixture: weights of products that no module is named after."""
        return self.parameter and bool(self.unnamed)

    @property
    def unnamed(self) -> tuple[int, ...]:
        """Which of the stacked axes, counted from 0, have no part in names: experts of one parameter."""
        names = self.index_after[: len(self.stack)]
        return tuple(position for position, name in enumerate(names) if name is None)

    @property
    def order(self) -> tuple[int, ...]:
        """Axes in canonical order: stack, inputs, outputs."""
        return (*self.stack, *self.inp, *self.out)

    def check(self, shape: tuple[int, ...], path: str) -> None:
        """Raise ValueError unless every axis of ``shape`` has exactly one role."""
        if sorted(self.order) != list(range(len(shape))):
            raise ValueError(
                f"{self} names axes {sorted(self.order)} for leaf '{path}' of shape {shape}. "
                f"Name each of the axes 0 to {len(shape) - 1} once, as in Layout(stack=(0,), inp=(1,), out=(2,))."
            )
        if not set(self.taps) <= set(self.inp):
            raise ValueError(f"{self} names taps of leaf '{path}' that are no input axes. Name them in inp= too.")
        if self.groups < 1 or (self.groups > 1 and not self.taps) or self.sizes(shape)[1] % self.groups:
            raise ValueError(
                f"groups={self.groups} of leaf '{path}' of shape {shape} are not those of a convolution. Name the axes "
                "of its positions in taps=, and a number that divides that of its outputs."
            )
        if self.numbers and self.stack_shape(shape)[:1] != (len(self.numbers),):
            raise ValueError(
                f"{self} gives leaf '{path}' of shape {shape} {len(self.numbers)} numbers of layers. Give one for each "
                "of its layers."
            )
        if len(self.stack) > len(self.index_after):
            raise ValueError(
                f"Leaf '{path}' has {len(self.stack)} stacked axes but index_after={self.index_after}. "
                "Give one path component per stacked axis, or None for the experts of one parameter."
            )

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of the stacked axes."""
        return picked(shape, self.stack)

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """``(in, out)`` of the matrix; ``in`` is 1 for a vector."""
        return math.prod(picked(shape, self.inp)), math.prod(picked(shape, self.out))

    def matrix(self, array: jax.Array) -> jax.Array:
        """``array`` as ``(*stack, in, out)``, or ``(*stack, out)`` for a vector."""
        stack, sizes = self.stack_shape(array.shape), self.sizes(array.shape)
        last = sizes if self.inp else sizes[1:]
        return _transpose(array, self.order).reshape(*stack, *last)

    def unmatrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `matrix`, for a leaf of shape ``shape``."""
        back = tuple(self.order.index(axis) for axis in range(len(shape)))
        return _transpose(matrix.reshape(picked(shape, self.order)), back)

    def unstacked(self, position: int) -> "Layout":
        """The layout of one slice along one of the stacked axes."""
        gone = self.stack[position]

        def left(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - (axis > gone) for axis in axes if axis != gone)

        return dataclasses.replace(
            self,
            stack=left(self.stack),
            inp=left(self.inp),
            out=left(self.out),
            taps=left(self.taps),
            index_after=self.index_after[:position] + self.index_after[position + 1 :],
            numbers=self.numbers if position else (),
        )

    def stacked(self) -> "Layout":
        """The layout of several leaves like one, stacked along a new first axis."""

        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis + 1 for axis in axes)

        return dataclasses.replace(
            self,
            stack=(0, *moved(self.stack)),
            inp=moved(self.inp),
            out=moved(self.out),
            taps=moved(self.taps),
            index_after=("", *self.index_after),
        )

    def split(self, position: int, count: int) -> "Layout":
        """The layout once one of the stacked axes is split into ``count`` axes."""
        at = self.stack[position]

        def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis + (count - 1) * (axis > at) for axis in axes)

        stack = moved(self.stack)
        names = self.index_after
        return dataclasses.replace(
            self,
            stack=(*stack[:position], *range(at, at + count), *stack[position + 1 :]),
            inp=moved(self.inp),
            out=moved(self.out),
            taps=moved(self.taps),
            index_after=names[:position] + names[position : position + 1] * count + names[position + 1 :],
        )

    def join(self, position: int) -> "Layout":
        """The layout once one of the stacked axes and the next one, which is beside it, are joined."""
        return self.unstacked(position + 1)


def _transpose(array: jax.Array, permutation: tuple[int, ...]) -> jax.Array:
    return array if permutation == tuple(range(array.ndim)) else jnp.transpose(array, permutation)


@dataclasses.dataclass(frozen=True)
class Ambiguous:
    """Stands in place of a layout: why a leaf has none, and what was found."""

    why: str
    found: tuple[str, ...] = ()


CONVENTION = "by convention"  # the source of a layout that a leaf's name and rank alone give begins so
READ = "read off the program"  # the source of a layout with known axes, whose stacked ones have no known names
LEAF_NAMES = ("kernel", "weight", "embedding", "bias", "scale")
VECTOR_NAMES = ("bias", "scale", "gain", "gamma", "beta")  # one layer of such a leaf has one axis
LISTS = ("layers", "h", "blocks", "block", "layer")  # what frameworks call their lists of layers


def conventional_layout(path: str, shape: tuple[int, ...], fan_in_fan_out: bool = False) -> Layout | None:
    """The layout that the frameworks' conventions give a leaf, or None where they give none.

    ``kernel`` (Flax) is ``(in, out)``; ``weight`` (PyTorch, Equinox) is ``(out, in)``, or ``(in, out)`` with
    ``fan_in_fan_out``; ``embedding`` is ``(vocabulary, features)``; other matrices are ``(in, out)``.
    A matrix of higher rank is ambiguous: no convention distinguishes its stacked axes from its heads.
    """
    name = path.rsplit(".", 1)[-1]
    source = f"{CONVENTION} for '{name}'"
    if len(shape) == 1:
        return Layout(inp=(), out=(0,), source=source)
    if name in VECTOR_NAMES or len(shape) != 2:
        return None
    if name == "weight" and not fan_in_fan_out:
        return Layout(inp=(1,), out=(0,), source=source)
    return Layout(lookup=name == "embedding", source=source)
