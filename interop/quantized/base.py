"""Parts that all formats of quantized checkpoints share: a packed weight, and the tensors that it is read from."""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, Packed

from peft_jax.core.selecting import field_names, fields_of

INT8, UINT8, INT32, INT64 = (np.dtype(name) for name in ("int8", "uint8", "int32", "int64"))
FLOAT32, FLOAT16, BFLOAT16 = (np.dtype(one) for one in (np.float32, np.float16, jnp.bfloat16))
FLOATS = (FLOAT32, FLOAT16, BFLOAT16)
CHUNK = 1 << 18  # elements that are dequantized at a time
COPY = "Take an undamaged copy of the checkpoint."

Array = np.ndarray[Any, np.dtype[Any]]
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedTensor(Packed):
    """A weight as its file has it; read as an array, it is dequantized. Subclasses hold the packed arrays.

    Attributes:
        key: The key that the weight has in a checkpoint that is not quantized.
        shape: Its shape there, for a linear layer ``(out, in)``.
        dtype: The element type that the format's own reader dequantizes to.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abc.abstractmethod
    def dequantize(self) -> Array:
        """The weight in ``shape`` and ``dtype``, computed anew at each call."""

    @property
    def nbytes(self) -> int:
        """Bytes of the dequantized weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the arrays that it is stored in."""
        fields = fields_of(self, field_names(self)).values()
        return sum(field.nbytes for field in fields if isinstance(field, np.ndarray))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> Array:
        array = self.dequantize()
        return array if dtype is None else array.astype(dtype)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Transposed(QuantizedTensor):
    """A matrix for a checkpoint whose plain weights are stored as ``(in, out)``.

    Attributes:
        source: The weight as ``(out, in)``.
    """

    source: QuantizedTensor

    @classmethod
    def of(cls, source: QuantizedTensor) -> "Transposed":
        """The transpose of a weight."""
        return cls(key=source.key, shape=source.shape[::-1], dtype=source.dtype, source=source)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the arrays that the weight is stored in."""
        return self.source.packed_nbytes

    def dequantize(self) -> Array:
        """The transpose of the dequantized weight."""
        return self.source.dequantize().T

    def form(self) -> Form | None:
        """That of the weight, with the other order of axes."""
        form = self.source.form()
        return None if form is None else form._replace(is_transposed=True)

    def codes(self) -> Codes:
        """Those of the weight, which are ``(in, out)`` in any case."""
        return self.source.codes()


class StoredTensors:
    """The tensors of a quantized checkpoint. A format takes those that it reads; what is left is stored as it is.

    Attributes:
        left: Tensors by key that nobody has taken yet.
        metadata: The texts in the headers of the files.
        quantizes_activations: Whether the format's own reader rounds activations too.
    """

    def __init__(self, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        self.left = dict(tensors)
        self.metadata = metadata
        self.quantizes_activations = False

    def modules(self, ending: str) -> list[str]:
        """Names in front of this ending of a key, in the order of the keys."""
        return [key.removesuffix(ending) for key in self.left if key.endswith(ending)]

    def take(self, key: str, dtypes: Iterable[np.dtype[Any]], shape: tuple[int, ...] | None = None) -> Array:
        """Remove a tensor and return it.

        Raises:
            ValueError: It is missing, or of another element type or shape.
        """
        if key not in self.left:
            raise ValueError(f"The checkpoint has no tensor '{key}', which its quantized weight needs. {COPY}")
        found = self.left.pop(key)
        allowed = tuple(dtypes)
        if found.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            raise damaged(key, f"is {found.dtype}, not {names} as its format has it")
        if shape is not None and found.shape != shape:
            raise damaged(key, f"has shape {found.shape}, not {shape} as the tensors that it belongs to")
        return found

    def take_if_there(
        self, key: str, dtypes: Iterable[np.dtype[Any]], shape: tuple[int, ...] | None = None
    ) -> Array | None:
        """As `take`; None if there is no such tensor."""
        return self.take(key, dtypes, shape) if key in self.left else None

    def drop_activations(self, endings: Iterable[str]) -> None:
        """Remove the tensors that only a quantization of activations needs: their keys end so."""
        suffixes = tuple(f".{ending}" for ending in endings)
        for key in [key for key in self.left if key.endswith(suffixes)]:
            del self.left[key]
            self.quantizes_activations = True


def damaged(key: str, why: str, advice: str = COPY) -> ValueError:
    """The error for a tensor that does not fit its format."""
    return ValueError(f"The checkpoint's tensor '{key}' {why}. {advice}")


def refused(settings: Settings, field: str, found: object, read: Iterable[object]) -> ValueError:
    """The error for a value in quantization_config that is not read."""
    names = ", ".join(repr(one) for one in read)
    return ValueError(
        f"{field}={found!r} in the checkpoint's quantization_config (quant_method={settings.get('quant_method')!r}) is "
        f"not supported. Supported: {names}. Load the unquantized checkpoint."
    )


def number(settings: Settings, field: str, default: int | None = None) -> int:
    """An integer in quantization_config.

    Raises:
        ValueError: It is missing or something else.
    """
    found = settings.get(field, default)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"{field} in the checkpoint's quantization_config is an integer, found {found!r}. {COPY}")
    return found


def unpack(words: Array, bits: int) -> Array:
    """Split the integers of the last axis into unsigned fields, lowest bits first; fields may straddle integers.

    Example:
        >>> unpack(np.array([0x76543210], np.int32), 4).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        fields = np.empty((*octets.shape, 8 // bits), np.uint8)
        for place in range(8 // bits):
            np.bitwise_and(octets >> np.uint8(place * bits), np.uint8(2**bits - 1), out=fields[..., place])
        return fields.reshape(*octets.shape[:-1], -1)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    stream = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    places = np.arange(bits, dtype=np.uint8)
    return (stream << places).sum(axis=-1, dtype=np.uint8)


def by_rows(shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[[slice], Array]) -> Array:
    """An array made some rows at a time: what is computed on the way stays in the processor's caches.

    Args:
        shape: Its shape.
        dtype: Its element type; what ``make`` gives is rounded to it.
        make: ``make(rows)`` gives these rows.

    Example:
        >>> by_rows((2, 3), FLOAT32, lambda rows: np.ones((2, 3))[rows]).shape
        (2, 3)
    """
    array = np.empty(shape, dtype)
    step = max(1, CHUNK // math.prod(shape[1:]))

    def fill(start: int) -> None:
        rows = slice(start, min(start + step, len(array)))
        array[rows] = make(rows)

    with ThreadPoolExecutor() as pool:  # NumPy releases Python's lock while it computes
        for _ in pool.map(fill, range(0, len(array), step)):
            pass
    return array


class Blocks(NamedTuple):
    """Numbers that blocks of a matrix have in common.

    Attributes:
        rows: float32 ``(out, blocks of in)``.
        columns: int ``(in,)``: the block of each input.
    """

    rows: Array
    columns: Array

    @classmethod
    def of(
        cls, numbers: Array, shape: tuple[int, ...], block: tuple[int, int], columns: Array | None = None
    ) -> "Blocks":
        """Numbers ``(blocks of out, blocks of in)`` of a matrix of this shape; the last blocks may be cut off.

        Example:
            >>> Blocks.of(np.array([[1, 2]]), (2, 3), (2, 2)).at(slice(0, 2)).tolist()
            [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]]
        """
        rows = np.repeat(numbers, block[0], axis=0)[: shape[0]]
        columns = np.arange(shape[1]) // block[1] if columns is None else columns
        return cls(np.ascontiguousarray(rows, np.float32), columns)

    def at(self, rows: slice) -> Array:
        """One number for each element of these rows."""
        return np.take(self.rows[rows], self.columns, axis=1)


def scaled_by_rows(
    weight: QuantizedTensor, values: Callable[[slice], Array], scale: Blocks, zeros: Blocks | None = None
) -> Array:
    """Values less their zero points, times their scales, in the weight's shape and element type.

    All is computed in float32, where differences of integers and products of 16-bit floats are exact, and rounded once.

    Args:
        weight: What is dequantized.
        values: ``values(rows)`` gives integers or floats ``(rows, in)``.
        scale: The scales.
        zeros: The zero points, if there are any.
    """

    def make(rows: slice) -> Array:
        part = values(rows).astype(np.float32)
        if zeros is not None:
            part -= zeros.at(rows)
        part *= scale.at(rows)
        return part

    return by_rows(weight.shape, weight.dtype, make)
