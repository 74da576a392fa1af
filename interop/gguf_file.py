"""Tensors of GGUF files as arrays that are dequantized where they are read, by the package gguf's own function."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from peft_jax.interop.packed_codes import Codes, Form, Packed, integer_codes, integer_form

from peft_jax.core.float_types import wider_float
from peft_jax.core.gguf_metadata import GGUFFile

PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}  # kinds that hold values, not blocks
INTEGERS = {"Q4_0": 4, "Q8_0": 8}  # bits of the kinds whose blocks are integers around 0 and a scale
BLOCK = 32  # elements of a block of these


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFTensor(Packed):
    """A tensor of a GGUF file: an array by its shape, its element type, its rows and `numpy.asarray`.

    Memory holds the values of the rows that are asked for, and none of them after that.

    Attributes:
        name: GGUF's name of it.
        stored: What the file holds: values, or bytes of blocks along the last axis.
        kind: The package's element type.
        order: The stored row that each row is; None for the order of the file.
        is_transposed: Whether its last two axes are those of what is stored the other way around.
        added: A number that each value is increased by.

    Example:
        >>> from types import SimpleNamespace
        >>> kind = SimpleNamespace(name="F16")
        >>> tensor = GGUFTensor("t", np.array([[1, 2], [3, 4]], np.float16), kind)
        >>> tensor.reordered(np.array([1, 0]))[:1].tolist(), tensor.transposed().shape
        ([[3.0, 4.0]], (2, 2))
    """

    name: str
    stored: np.ndarray
    kind: Any
    order: np.ndarray | None = None
    is_transposed: bool = False
    added: float = 0.0

    def reordered(self, order: np.ndarray) -> Self:
        """The tensor whose rows are the stored ones of these numbers."""
        return dataclasses.replace(self, order=order)

    def transposed(self) -> Self:
        """Its transpose; of several matrices in one tensor that of each."""
        return dataclasses.replace(self, is_transposed=True)

    def part(self, number: int) -> Self:
        """One of the tensors that are stacked in it along the first axis, in the order of the file."""
        return dataclasses.replace(self, stored=self.stored[number])

    def plus(self, number: float) -> Self:
        """The tensor with a number added to each value, in float32."""
        return dataclasses.replace(self, added=number)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, that of the values."""
        width = self.stored.shape[-1]
        if self.kind.name not in PLAIN:
            elements, size = _block(self.kind)
            width = width // size * elements
        elif self.stored.dtype == np.uint8:
            width = width // np.dtype(PLAIN[self.kind.name]).itemsize
        shape = (*self.stored.shape[:-1], width)
        return (*shape[:-2], *shape[:-3:-1]) if self.is_transposed else shape

    @property
    def dtype(self) -> Any:
        """The element type of its values: float32 unless the file holds values of another one."""
        return np.dtype(np.float32 if self.added else PLAIN.get(self.kind.name, np.float32))

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in blocks."""
        return self.kind.name not in PLAIN

    @property
    def packed_nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.stored.nbytes

    @property
    def kinds(self) -> frozenset[str]:
        """The name of its kind."""
        return frozenset({self.kind.name})

    def form(self) -> Form | None:
        """Integers by groups, of Q4_0 and Q8_0; None for the other kinds."""
        bits = INTEGERS.get(self.kind.name)
        if bits is None or self.stored.ndim != 2 or self.added:
            return None
        return integer_form(bits, BLOCK, np.dtype(np.float32), None, is_transposed=self.is_transposed)

    def codes(self) -> Codes:
        """Integers around 0 and float16 scales: two integers of Q4_0 a byte, those of half a block one from the other.

        https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ``block_q4_0`` and ``block_q8_0`` of ggml.
        """
        form = self.form()
        if form is None:
            return super().codes()
        rows = np.ascontiguousarray(self.stored if self.order is None else self.stored[self.order])
        blocks = rows.view(np.uint8).reshape(len(rows), -1, _block(self.kind)[1])
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        octets = blocks[..., 2:]
        if INTEGERS[self.kind.name] == 4:
            signed = np.concatenate((octets & 15, octets >> 4), axis=-1).astype(np.int8) - np.int8(8)
        else:
            signed = octets.view(np.int8)
        return integer_codes(form, signed.reshape(len(rows), -1).T, scale.T, None)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self.stored.ndim == 1 or (self.is_transposed and self.stored.ndim == 2):
            return np.asarray(self)[rows]
        return self._turned(self._values(self.stored[rows] if self.order is None else self.stored[self.order[rows]]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._values(self.stored if self.order is None else self.stored[self.order])
        values = self._turned(values)
        return values if dtype is None else values.astype(dtype)

    def astype(self, dtype: DTypeLike) -> np.ndarray:
        """Its values in an element type."""
        return np.asarray(self, dtype)

    def _turned(self, values: np.ndarray) -> np.ndarray:
        return values.swapaxes(-1, -2) if self.is_transposed else values

    def _values(self, stored: np.ndarray) -> np.ndarray:
        plain = PLAIN.get(self.kind.name)
        values = dequantize_blocks(stored, self.kind) if plain is None else np.ascontiguousarray(stored).view(plain)
        return values.astype(np.float32) + np.float32(self.added) if self.added else values


class AlternatingTensor(Packed):
    """Tensors of all experts whose outputs take turns in one: the first of each, the second of each, and so on.

    Memory holds the values of one expert of one of them beside those of the whole.

    Args:
        parts: Matrices ``(experts, in, out)``, or vectors ``(experts, out)``; all of one shape.

    Raises:
        ValueError: The shapes differ; the message names the tensors.

    Example:
        >>> from types import SimpleNamespace
        >>> gate = GGUFTensor("gate", np.array([[1, 3]], np.float32), SimpleNamespace(name="F32"))
        >>> np.asarray(AlternatingTensor([gate, gate.plus(1)])).tolist()
        [[1.0, 2.0, 3.0, 4.0]]
    """

    def __init__(self, parts: Sequence[GGUFTensor]) -> None:
        first, *_ = self.parts = tuple(parts)
        if any(part.shape != first.shape for part in parts):
            told = " and ".join(f"{part.name} {part.shape}" for part in parts)
            raise ValueError(f"the shapes of {told} differ")
        self.shape = (*first.shape[:-1], len(parts) * first.shape[-1])
        self.dtype = np.dtype(functools.reduce(wider_float, [part.dtype for part in parts]))

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_quantized(self) -> bool:
        """Whether one of its parts is stored in blocks."""
        return any(part.is_quantized for part in self.parts)

    @property
    def packed_nbytes(self) -> int:
        """Bytes that its parts take in the file."""
        return sum(part.packed_nbytes for part in self.parts)

    @property
    def kinds(self) -> frozenset[str]:
        """The names of its parts' kinds."""
        return frozenset().union(*(part.kinds for part in self.parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._of_experts(range(len(self))[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._of_experts(range(len(self)))
        return values if dtype is None else values.astype(dtype)

    def _of_experts(self, experts: range) -> np.ndarray:
        """The values of some experts, which are filled in row by row as the file has matrices: ``(out, in)``."""
        filled = np.empty((len(experts), *self.shape[:0:-1]), self.dtype)
        for place, expert in enumerate(experts):
            for number, part in enumerate(self.parts):
                filled[place, number :: len(self.parts)] = part[expert : expert + 1][0].T
        return filled.swapaxes(1, 2) if filled.ndim == 3 else filled


def dequantize_blocks(stored: np.ndarray, kind: Any) -> np.ndarray:
    """Values in float32 of rows of blocks, by gguf's own function."""
    from gguf import dequantize  # an optional dependency, which is there where a file was opened

    return np.asarray(dequantize(np.ascontiguousarray(stored), kind))


def read_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The tensors of a file by GGUF's names, each checked for a kind that can be dequantized.

    Raises:
        ValueError: if the package gguf cannot dequantize a kind of them.
    """
    tensors = {name: GGUFTensor(name, found.data, found.tensor_type) for name, found in file.tensors.items()}
    one_of_each = {tensor.kind: tensor for tensor in tensors.values()}
    for kind, tensor in one_of_each.items():
        if kind.name in PLAIN:
            continue
        try:
            dequantize_blocks(tensor.stored.reshape(-1)[: _block(kind)[1]], kind)
        except NotImplementedError as error:
            raise ValueError(
                f"'{file.path}' has tensors of the kind {kind.name}, such as {tensor.name}, which the package gguf "
                "cannot dequantize. Take a file of another kind, such as Q4_K_M or Q8_0."
            ) from error
    return tensors


def kinds_of(tensors: Iterable[GGUFTensor | AlternatingTensor]) -> list[str]:
    """The names of the kinds of tensors that hold blocks; empty for a file of plain values."""
    return sorted(set[str]().union(*(tensor.kinds for tensor in tensors)) - PLAIN.keys())


def float_type(tensors: Iterable[GGUFTensor]) -> str:
    """The element type for a model: float32 if there are blocks, else the half type among its values if there is one.

    Norms are float32 in files of half values, so that the half type is the model's.
    """
    tensors = list(tensors)
    if kinds_of(tensors):
        return "float32"
    names = {np.dtype(PLAIN[tensor.kind.name]).name for tensor in tensors}
    for name in ("bfloat16", "float16"):
        if name in names:
            return name
    return "float32"


def _block(kind: Any) -> tuple[int, int]:
    """The elements and the bytes of a block."""
    from gguf import GGML_QUANT_SIZES

    elements, size = GGML_QUANT_SIZES[kind]
    return int(elements), int(size)
