"""Weights of files in their own bits: the numbers, scales and zero points that a weight of `peft_jax.quant` is made of.

A tensor of a quantized file says by its `Form` which weight holds it exactly, or that none does. Its numbers are
unpacked and packed again one tensor at a time, as a file's order of bits is its own.
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.quant.double_scale import DoubleScale
from peft_jax.quant.int8 import Int8
from peft_jax.quant.kinds import FLOATS, INTEGERS
from peft_jax.quant.quantized import Quantized

INT4, INT8 = "int4", "int8"
RANGES = {INT4: (-8, 7), INT8: (-128, 127)}

Array = np.ndarray


class Form(NamedTuple):
    """The weight that holds a tensor exactly: all of it but the numbers.

    Attributes:
        kind: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"int8"``.
        group_size: Inputs that share a scale; None for int8 with scales that are counted in ``unit``.
        dtype: The element type that the file's own reader rounds the values to.
        has_zeros: Whether there are zero points.
        is_nested: Whether the scales are in 8 bits themselves.
        unit: What the scales of int8 without groups are counted in.
        is_transposed: Whether the axes of the tensor are ``(in, out)``.
    """

    kind: str
    group_size: int | None
    dtype: np.dtype
    has_zeros: bool = False
    is_nested: bool = False
    unit: float = 1.0
    is_transposed: bool = False


class Codes(NamedTuple):
    """The arrays of a tensor, in the order that `peft_jax.quant` has.

    Attributes:
        numbers: ``(in, out)``: of nf4, fp4 and int4 from 0 to 15, of int8 from -128 to 127.
        scale: float32 ``(groups, out)``; ``(out,)`` without groups, or ``(n,)`` of blocks that run on from one output
            to the next. uint8 if nested.
        zeros: Integers ``(groups, out)``, if there are zero points.
        largest: float32, of nested scales: see `DoubleScale`.
        offset: float32, of nested scales.
    """

    numbers: Array
    scale: Array
    zeros: Array | None = None
    largest: Array | None = None
    offset: Array | None = None


class Packed(abc.ABC):
    """A tensor of a file that is read as an array, and may be in few bits there.

    Attributes:
        shape: That of the values.
    """

    shape: Any

    @property
    def is_quantized(self) -> bool:
        """Whether the file has it in few bits."""
        return True

    @property
    @abc.abstractmethod
    def packed_nbytes(self) -> int:
        """Bytes that it takes in the file."""

    def form(self) -> Form | None:
        """The weight that holds it exactly; None if there is none."""
        return None

    def codes(self) -> Codes:
        """Its arrays, for a tensor that has a form."""
        raise NotImplementedError(f"{type(self).__name__} has no weight that holds it.")


class Kept(NamedTuple):
    """How a leaf is kept in its file's own bits: the form of its tensors, its axes, and its element type."""

    form: Form
    layout: Layout
    dtype: np.dtype


def kept_weight(codes: Codes, kept: Kept) -> Quantized:
    """The weight of one tensor; of a stacked leaf as a stack of one.

    Example:
        >>> codes = Codes(np.array([[1], [-2]], np.int8), np.array([[0.5]], np.float32))
        >>> kept = Kept(Form("int8", 2, np.dtype(np.float32)), Layout(), np.dtype(np.float32))
        >>> kept_weight(codes, kept).dense().ravel().tolist()
        [0.5, -1.0]
    """
    form, layout, dtype = kept
    if layout.stack:
        codes = jax.tree.map(lambda array: array[None], codes)
    if form.group_size is None:
        return Int8(jnp.asarray(codes.numbers), jnp.asarray(codes.scale), layout, jnp.dtype(dtype), form.unit)
    numbers, scale = jnp.asarray(codes.numbers), jnp.asarray(codes.scale)
    if form.kind in FLOATS:
        scales = DoubleScale(scale, jnp.asarray(codes.largest), jnp.asarray(codes.offset)) if form.is_nested else scale
        floats = FLOATS[form.kind]
        return floats.from_codes(numbers, scales, dtype, layout, block=form.group_size, file_dtype=form.dtype)
    integers = INTEGERS[form.kind]
    zero = None if codes.zeros is None else jnp.asarray(codes.zeros)
    return integers.from_codes(
        numbers, scale, dtype, layout, group_size=form.group_size, zero=zero, file_dtype=form.dtype
    )


def integer_form(
    bits: int, group_size: int, dtype: np.dtype, zeros: Array | None, *, is_transposed: bool = False
) -> Form | None:
    """The form of integers by groups: int4 holds those of up to 4 bits, and int8 the others.

    Args:
        bits: Bits of an integer.
        group_size: Inputs that share a scale.
        dtype: The element type that the file's own reader rounds the values to.
        zeros: Signed zero points, if there are any.
        is_transposed: Whether the axes of the tensor are ``(in, out)``.

    Example:
        >>> integer_form(3, 32, np.dtype(np.float16), None).kind
        'int4'
    """
    kind = INT4 if bits <= 4 else INT8
    if kind == INT4 and group_size % 2:
        return None  # two numbers of a group share a byte
    low, high = RANGES[kind]
    if zeros is not None and (zeros.dtype.kind not in "iu" or zeros.min() < low or zeros.max() > high):
        return None
    return Form(kind, group_size, dtype, zeros is not None, is_transposed=is_transposed)


def integer_codes(form: Form, signed: Array, scale: Array, zeros: Array | None) -> Codes:
    """The arrays of integers by groups.

    Args:
        form: Their form.
        signed: Integers ``(in, out)``, those of few bits around 0.
        scale: ``(groups, out)``.
        zeros: Signed zero points ``(groups, out)``, if there are any.
    """
    own_zero, dtype = (8, np.uint8) if form.kind == INT4 else (0, np.int8)
    stored = None if zeros is None else (zeros.astype(np.int16) + own_zero).astype(dtype)
    return Codes((signed.astype(np.int16) + own_zero).astype(dtype), scale.astype(np.float32), stored)


def by_output(numbers: Array, shape: tuple[int, ...], block: tuple[int, int], groups: Array | None = None) -> Array:
    """Numbers of blocks ``(blocks of out, blocks of in)`` as ``(groups, out)``.

    Args:
        numbers: One for each block.
        shape: Of the weight, ``(out, in)``.
        block: Elements of a block along both axes.
        groups: The block of each group of inputs; None if they are in order.

    Example:
        >>> by_output(np.array([[1, 2]]), (3, 4), (3, 2)).tolist()
        [[1, 1, 1], [2, 2, 2]]
    """
    rows = np.repeat(numbers, block[0], axis=0)[: shape[0]]
    return rows.T if groups is None else rows.T[groups]


def regular_groups(g_idx: Array, size: int) -> Array | None:
    """The group of each run of so many inputs; None if the inputs of one are of several groups.

    Example:
        >>> regular_groups(np.array([1, 1, 0, 0]), 2).tolist(), regular_groups(np.array([1, 0, 0, 1]), 2)
        ([1, 0], None)
    """
    firsts = g_idx[::size]
    return firsts if np.array_equal(np.repeat(firsts, size)[: len(g_idx)], g_idx) else None
