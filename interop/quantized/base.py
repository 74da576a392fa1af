"""Parts that all formats of quantized checkpoints share: a packed weight, and the tensors that it is read from."""

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

INT8, UINT8, INT32, INT64 = (np.dtype(name) for name in ("int8", "uint8", "int32", "int64"))
FLOAT32, FLOAT16, BFLOAT16 = (np.dtype(one) for one in (np.float32, np.float16, jnp.bfloat16))
FLOATS = (FLOAT32, FLOAT16, BFLOAT16)
COPY = "Take an undamaged copy of the checkpoint."

Array = np.ndarray[Any, np.dtype[Any]]
Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedTensor(abc.ABC):
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
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
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
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (octets[..., None] >> shifts) & np.uint8(2**bits - 1)
        return fields.reshape(*octets.shape[:-1], -1)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    count = stream.shape[-1] // bits
    stream = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    places = np.arange(bits, dtype=np.uint8)
    return (stream << places).sum(axis=-1, dtype=np.uint8)


def spread(blocks: Array, shape: tuple[int, ...], block: tuple[int, ...]) -> Array:
    """Repeat one value a block to one an element; the last block of an axis may be cut off.

    Example:
        >>> spread(np.array([[1, 2]]), (2, 3), (2, 2)).tolist()
        [[1, 1, 2], [1, 1, 2]]
    """
    for axis, (size, length) in enumerate(zip(block, shape, strict=True)):
        if size != 1:
            blocks = np.repeat(blocks, size, axis=axis)
        blocks = np.take(blocks, range(length), axis=axis) if blocks.shape[axis] != length else blocks
    return blocks


def scaled(values: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
    """The product, rounded once: computed in float32, where a product of 16-bit floats is exact."""
    product = values.astype(np.float32) * scale.astype(np.float32)
    return product.astype(dtype)
