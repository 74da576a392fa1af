"""How a program uses a matrix: a product, a lookup, a convolution. All are linear in the matrix, and factor with it.

A method that adds ``A B`` to a matrix needs no sum of matrices: ``full(x, A @ B) == up(down(x, A), B)``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from peft_jax.core.float_types import added, wider_float


class FirstFactor(NamedTuple):
    """Which first factor: that of an adapter on a leaf, by the number of adapters under it, and its role there."""

    depth: int
    role: str


@dataclasses.dataclass(frozen=True, eq=False)
class SharedFirstProducts:
    """The products of one input with the first factors of a leaf's adapters, computed before the adapters run.

    Attributes:
        x: The input.
        factors: The first factors, ``(in, rank)``, as `peft_jax.core.weight.Weight.first_factors` gives them.
        results: For each of them the product with ``x``.
    """

    x: jax.Array
    factors: Mapping[FirstFactor, jax.Array]
    results: Mapping[FirstFactor, jax.Array]

    def result(self, x: jax.Array, which: FirstFactor, factor: jax.Array) -> jax.Array | None:
        """The product of ``x`` with a factor; None if it is of another input, as dropout or an outer adapter makes one.

        Raises:
            ValueError: if the factor is another one than the product was computed with.
        """
        if x is not self.x or which not in self.results:
            return None
        if factor is not self.factors[which]:
            raise ValueError(
                f"product.down_by_role got another array as '{which.role}' than the adapter's own, with which its "
                "product is computed already. Write product.down(x, array) for an array that apply has changed."
            )
        return self.results[which]


@dataclasses.dataclass(frozen=True)
class Product:
    """``x @ matrix``, for ``x`` of shape ``(..., in)``, and base class of the other products.

    Attributes:
        precision: As ``jax.lax.dot_general`` takes it.
        preferred_element_type: Element type of the result; None for that of ``x``.
        out_sharding: Sharding of the result, which a mesh of explicit axes has to be given.
        shared: Products with first factors that are computed already.
        depth: Number of adapters under the one that the product is handed to.
        in_sizes: Sizes of the axes that a program has for the inputs, such as ``(heads, head_dim)``, where they are
            several. The product is computed over them as they are: a compiler for TPUs copies what is reshaped.
        out_sizes: Likewise of the outputs.
    """

    precision: Any = None
    preferred_element_type: jnp.dtype | None = None
    out_sharding: NamedSharding | None = None
    shared: SharedFirstProducts | None = None
    depth: int = 0
    in_sizes: tuple[int, ...] = ()
    out_sizes: tuple[int, ...] = ()

    @property
    def looks_up(self) -> bool:
        """Whether ``x`` are indices of rows."""
        return False

    @property
    def is_plain(self) -> bool:
        """Whether it is ``x @ matrix``, and no sharding of the result is asked for."""
        return type(self) is Product and self.out_sharding is None

    def full(self, x: Shaped[Array, "... in"], matrix: Shaped[Array, "in out"]) -> Shaped[Array, "... out"]:
        """The product with a matrix ``(in, out)``; gives ``(..., out)``."""
        kind = self.preferred_element_type
        if self.in_sizes or self.out_sizes:
            return _over_axes(x, matrix, self.in_sizes, self.out_sizes, self.precision, kind)
        return jnp.matmul(
            x, matrix, precision=self.precision, preferred_element_type=kind, out_sharding=self.out_sharding
        )

    def full_of_integers(self, x: Shaped[Array, "... in"], matrix: Shaped[Array, "in out"]) -> Shaped[Array, "... out"]:
        """`full` with a matrix of integers: compilers convert it where they read it, and keep no copy."""
        return self.full(x, matrix.astype(x.dtype))

    def full_in_blocks(
        self, x: Shaped[Array, "... in"], blocks: Shaped[Array, "*inputs out"]
    ) -> Shaped[Array, "... out"]:
        """The product with a matrix whose inputs are several axes, ``(*inputs, out)``; gives ``(..., out)``.

        They are contracted as they are: compilers fuse what makes the blocks into such a product, but not past a
        reshape of the matrix.
        """
        *inputs, n_out = blocks.shape
        if not self.is_plain:
            return self.full(x, blocks.reshape(-1, n_out))
        return _contracted(x, blocks, inputs, self.precision, self.preferred_element_type)

    def down(self, x: Shaped[Array, "... in"], a: Shaped[Array, "in rank"]) -> Shaped[Array, "... rank"]:
        """The product with the first factor of a matrix, ``(in, rank)``, in the precision of the factor."""
        if self.in_sizes:
            return _over_axes(x.astype(a.dtype), a, self.in_sizes, (), self.precision)
        inner = None
        if self.out_sharding is not None:
            spec = jax.typeof(x).sharding.spec
            inner = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec[:-1], None))
        return _in_rows(lambda x: jnp.matmul(x, a, precision=self.precision, out_sharding=inner), x.astype(a.dtype))

    def down_by_role(
        self, x: Shaped[Array, "..."], params: Mapping[str, jax.Array], role: str
    ) -> Shaped[Array, "... rank"]:
        """`down` with ``params[role]``, the array that a method names as its ``first``.

        Weights that are multiplied by one input share one product with their first factors. Its part is returned here
        if ``x`` is that input.
        """
        factor = params[role]
        result = None
        if self.shared is not None:
            result = self.shared.result(x, FirstFactor(self.depth, role), factor)
        return self.down(x, factor) if result is None else result

    def for_adapter(self, depth: int) -> Self:
        """The product as the adapter with this number of adapters under it gets it."""
        return self if self.shared is None else self.replace(depth=depth)

    def up(self, h: Shaped[Array, "... rank"], b: Shaped[Array, "rank out"]) -> Shaped[Array, "... out"]:
        """The result of `down` times the second factor, ``(rank, out)``."""
        if self.out_sizes:
            return _over_axes(h, b, (), self.out_sizes, self.precision)
        return _in_rows(lambda h: jnp.matmul(h, b, precision=self.precision, out_sharding=self.out_sharding), h)

    def added(self, y: Shaped[Array, "... out"], update: Shaped[Array, "... out"]) -> Shaped[Array, "... out"]:
        """Two results of one shape added, in the type of the first; see `peft_jax.core.float_types.added`."""
        split = (*y.shape[:-1], *_axes_of(y.shape[-1], self.out_sizes))
        return added(y.reshape(split), update.reshape(split)).reshape(y.shape)

    def scale(self, y: Shaped[Array, "*rows out"], scale: Shaped[Array, " out"]) -> Shaped[Array, "*rows out"]:
        """A result times a factor for each output, ``(out,)``, in the type of the result.

        They are multiplied in the wider of their types.
        """
        outputs = _axes_of(y.shape[-1], self.out_sizes)
        split = (*y.shape[:-1], *outputs)
        factors = scale.reshape(*(1,) * (y.ndim - 1), *outputs)
        return _multiplied(y.reshape(split), factors).reshape(y.shape)

    def computed_again(self, fn: Callable[..., jax.Array], x: jax.Array, *arrays: Any) -> jax.Array:
        """``fn(x, *arrays)``, a product with ``x``, which backward computes again from these.

        Inputs and results are kept in the axes that the program has for them.
        """
        rows, n_in = x.shape[:-1], x.shape[-1]

        @jax.checkpoint
        def apart(x: jax.Array, *arrays: Any) -> jax.Array:
            y = fn(x.reshape(*rows, n_in), *arrays)  # of all outputs
            return y.reshape(*y.shape[:-1], *self.out_sizes) if self.out_sizes else y

        y = apart(x.reshape(*rows, *_axes_of(n_in, self.in_sizes)), *arrays)
        if not self.out_sizes:
            return y
        return y.reshape(*y.shape[: -len(self.out_sizes)], math.prod(self.out_sizes))

    def replace(self, **changes: Any) -> Self:
        """The same product with other options."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Lookup(Product):
    """Rows of the matrix at indices ``x``, whose last axis is no input: gives ``(*x.shape, out)``."""

    options: tuple[tuple[str, Any], ...] = ()  # options of jax.lax.gather, as for indices at the edges
    untrained_row: int | None = None  # index of a row that gets no gradient, in every table that is read

    @property
    def looks_up(self) -> bool:
        """True."""
        return True

    def full(self, x: Shaped[Array, "..."], matrix: Shaped[Array, "in out"]) -> Shaped[Array, "... out"]:
        """The rows."""
        options = dict(self.options)
        if not jnp.issubdtype(matrix.dtype, jnp.inexact):
            options["fill_value"] = None
        numbers = jax.lax.GatherDimensionNumbers((x.ndim,), (0,), (0,))
        return self.trained(x, jax.lax.gather(matrix, x[..., None], numbers, (1, matrix.shape[1]), **options))

    def trained(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """Rows ``(*x.shape, out)`` that were looked up, without the gradient of the row that gets none."""
        if self.untrained_row is None:
            return rows
        return jnp.where((x == self.untrained_row)[..., None], jax.lax.stop_gradient(rows), rows)

    def down(self, x: Shaped[Array, "..."], a: Shaped[Array, "in rank"]) -> Shaped[Array, "... rank"]:
        """The rows of the first factor."""
        return self.full(x, a)


@dataclasses.dataclass(frozen=True)
class Grouped(Product):
    """Each row of ``x`` times the matrix of its group: ``jax.lax.ragged_dot``; matrices come stacked."""

    group_sizes: Any = None  # rows of each group, int32 ``(groups,)``; always given

    def full(self, x: Shaped[Array, "..."], matrix: Shaped[Array, "*groups in out"]) -> Shaped[Array, "... out"]:
        """The product with ``(groups, in, out)``."""
        kind = self.preferred_element_type
        return jax.lax.ragged_dot(x, matrix, self.group_sizes, self.precision, kind)

    def full_of_integers(
        self, x: Shaped[Array, "..."], matrix: Shaped[Array, "*groups in out"]
    ) -> Shaped[Array, "... out"]:
        """`full` with integers, which the TPU's grouped product of bfloat16 takes as they are; else they are copied."""
        if x.dtype != jnp.bfloat16:
            return self.full(x, matrix.astype(x.dtype))

        def converted(x: jax.Array, matrix: jax.Array) -> jax.Array:
            return self.full(x, matrix.astype(x.dtype))

        found: jax.Array = jax.lax.platform_dependent(x, matrix, tpu=self.full, default=converted)
        return found

    def down(self, x: Shaped[Array, "..."], a: Shaped[Array, "*groups in rank"]) -> Shaped[Array, "... rank"]:
        """The product with the first factors, ``(groups, in, rank)``, in the precision of the factors.

        The TPU's grouped product takes bfloat16 rows and float32 factors as they are; else the rows are copied.
        """

        def converted(x: jax.Array, a: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot(x.astype(a.dtype), a, self.group_sizes, self.precision)

        def on_tpu(x: jax.Array, a: jax.Array) -> jax.Array:
            # The kernel writes the factors' gradient with the rank as the last axis in memory, which a TPU fills up to
            # 128 numbers. The constraint is one of the gradient too, so that no stack of layers is kept like that.
            *groups, inputs, rank = range(a.ndim)
            a = with_layout_constraint(a, DeviceLayout((*groups, rank, inputs)))
            is_mixed = (x.dtype, a.dtype) == (jnp.bfloat16, jnp.float32)
            return self.down_of_two_types(x, a) if is_mixed else converted(x, a)

        found: jax.Array = jax.lax.platform_dependent(x, a, tpu=on_tpu, default=converted)
        return found

    def down_of_two_types(
        self, x: Shaped[Array, "... in"], a: Shaped[Array, "*groups in rank"]
    ) -> Shaped[Array, "... rank"]:
        """`down` without a copy of the rows in the type of the factors."""
        return jax.lax.ragged_dot(x, a, self.group_sizes, self.precision, a.dtype)

    def up(self, h: Shaped[Array, "... rank"], b: Shaped[Array, "*groups rank out"]) -> Shaped[Array, "... out"]:
        """The product with the second factors, ``(groups, rank, out)``."""
        return jax.lax.ragged_dot(h, b, self.group_sizes, self.precision)

    def scale(self, y: Shaped[Array, "*rows out"], scale: Shaped[Array, "*groups out"]) -> Shaped[Array, "*rows out"]:
        """Each row times its group's factors, ``(groups, out)``, in the type of the rows."""
        ones = jnp.ones((len(y), 1), scale.dtype)
        return _multiplied(y, jax.lax.ragged_dot(ones, scale[:, None], self.group_sizes, "highest"))


@dataclasses.dataclass(frozen=True)
class Convolution(Product):
    """A convolution of ``x`` with kernels whose taps and input channels are the rows of the matrix.

    Its second half is a convolution of one tap. The channels of results come last.

    Attributes:
        kernel: Gives the matrix ``(in, k)`` the shape of a kernel with ``k`` output channels.
        bind: The convolution of ``x`` and a kernel.
        groups: Groups of channels; each sees its own part of the input channels.
        rows: Rows of the matrix; for a first factor that sees the inputs of all groups, the rows of each group.
        in_axis: Axis of the input channels in a kernel.
        out_axis: Axis of the output channels in a kernel.
        channel_axis: Axis of the channels in what ``bind`` gives.
    """

    kernel: Callable[[jax.Array], jax.Array] = lambda matrix: matrix
    bind: Callable[..., jax.Array] = jnp.matmul
    groups: int = 1
    rows: int = 1
    in_axis: int = -2
    out_axis: int = -1
    channel_axis: int = -1

    def full(self, x: Shaped[Array, "..."], matrix: Shaped[Array, "in out"]) -> Shaped[Array, "... out"]:
        """The convolution."""
        y = self.bind(x, self.kernel(matrix), preferred_element_type=self.preferred_element_type)
        return jnp.moveaxis(y, self.channel_axis, -1)

    def down(self, x: Shaped[Array, "..."], a: Shaped[Array, "in rank"]) -> Shaped[Array, "... rank"]:
        """The convolution with the first factor: of all groups' inputs, or once for each group."""
        if len(a) == self.rows:
            kernel, groups = jnp.concatenate([self.kernel(a)] * self.groups, axis=self.out_axis), self.groups
        else:
            parts = jnp.split(a, self.groups)
            kernel, groups = jnp.concatenate([self.kernel(part) for part in parts], axis=self.in_axis), 1
        y = self.bind(x.astype(a.dtype), kernel, feature_group_count=groups, preferred_element_type=None)
        return jnp.moveaxis(y, self.channel_axis, -1)

    def up(self, h: Shaped[Array, "..."], b: Shaped[Array, "rank out"]) -> Shaped[Array, "... out"]:
        """The second factor, each group with its part of the output channels."""
        if self.groups == 1:
            return super().up(h, b)
        rank, out = b.shape
        h = h.reshape(*h.shape[:-1], self.groups, rank)
        b = b.reshape(rank, self.groups, out // self.groups)
        y = jnp.einsum("...gr,rgo->...go", h, b, precision=self.precision)
        return y.reshape(*y.shape[:-2], math.prod(y.shape[-2:]))


MATMUL = Product()


def _axes_of(size: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a program has for inputs or outputs; one, where there are as many others, such as ranks."""
    return sizes if sizes and math.prod(sizes) == size else (size,)


def _multiplied(y: jax.Array, factor: jax.Array) -> jax.Array:
    """``y * factor`` in the type of ``y``, multiplied in the wider of their types."""
    wide = wider_float(y.dtype, factor.dtype)
    return (y.astype(wide) * factor.astype(wide)).astype(y.dtype)


def _over_axes(
    x: Shaped[Array, "... in"],
    matrix: Shaped[Array, "in out"],
    in_sizes: tuple[int, ...],
    out_sizes: tuple[int, ...],
    precision: Any,
    preferred_element_type: jnp.dtype | None = None,
) -> Shaped[Array, "... out"]:
    """The product where the inputs or the outputs are several axes."""
    n_in, n_out = matrix.shape
    inputs, outputs = _axes_of(n_in, in_sizes), _axes_of(n_out, out_sizes)
    y = _contracted(x, matrix.reshape(*inputs, *outputs), inputs, precision, preferred_element_type)
    return y.reshape(*x.shape[:-1], n_out)


def _contracted(
    x: Shaped[Array, "... in"],
    kernel: Shaped[Array, "*axes"],
    inputs: Sequence[int],
    precision: Any,
    preferred_element_type: jnp.dtype | None,
) -> Shaped[Array, "*result"]:
    """The product over the first axes of a kernel, which are its inputs, as they are."""
    rows, count = x.shape[:-1], len(inputs)
    contracted = tuple(range(len(rows), len(rows) + count)), tuple(range(count))
    return jax.lax.dot_general(
        x.reshape(*rows, *inputs),
        kernel,
        (contracted, ((), ())),
        precision,
        preferred_element_type=preferred_element_type,
    )


def _in_rows(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A product with ``x`` of shape ``(..., in)`` as one matrix of rows, on one CPU.

    The gradient of a factor sums over all axes but the last. XLA's CPU backend copies an operand with several of them
    into another order first, which takes longer than the product. Its TPU backend copies what is reshaped instead.
    Over several devices the axes stay apart, because more than one of them may be sharded.
    """
    if x.ndim < 3 or jax.device_count() > 1 or jax.default_backend() != "cpu":
        return product(x)
    y = product(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))  # -1 could not tell where there are no features
    return y.reshape(*x.shape[:-1], y.shape[-1])
