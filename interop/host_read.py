"""Leaves of a checkpoint that are cast and transposed by the host, on the way from file to leaf.

Where JAX's device is the CPU, the array that is filled here becomes the leaf. XLA would hold each piece of it twice,
compile a program for each kind of leaf, and transpose several times slower than NumPy does strip by strip.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from peft_jax.interop.checkpoint_rows import Row
from peft_jax.interop.files import LazyArray

ALIGNMENT = 64  # bytes; JAX copies arrays that begin elsewhere
STRIP = 64  # rows of a matrix that are transposed at once, so that they stay in the processor's cache
BLOCK = 1 << 18  # bytes that are copied at once where nothing is transposed
THREADS = min(4, os.cpu_count() or 1)
EXPONENTS = {jnp.dtype(jnp.bfloat16): 0x7F80, jnp.dtype(jnp.float16): 0x7C00}  # all ones in infinities and NaN


@dataclasses.dataclass(frozen=True)
class Cast:
    """The conversion of tensors that are only cast.

    Attributes:
        dtype_of: The element type of a leaf, by its path.

    Example:
        >>> Cast(lambda path: jnp.bfloat16)("model.norm.scale", jnp.ones(2)).dtype
        dtype(bfloat16)
    """

    dtype_of: Callable[[str], DTypeLike]

    def __call__(self, path: str, array: jax.Array) -> jax.Array:
        """Cast an array on its device."""
        return array.astype(self.dtype_of(path))


class _Part(NamedTuple):
    """A tensor, and the place in a leaf that it is read into."""

    key: str
    tensor: LazyArray
    place: np.ndarray
    transposed: bool


def is_host_device() -> bool:
    """Whether JAX puts new arrays into the host's memory."""
    return all(device.platform == "cpu" for device in jax.device_put(np.float32(0)).devices())


def read_leaves(rows: Sequence[Row], tensors: Mapping[str, LazyArray], cast: Cast) -> dict[str, jax.Array]:
    """Read the leaves of these rows, by path.

    Tensors that are mapped into memory are read by several threads, and none is held beside its leaf. Others are
    computed one after the other.

    Args:
        rows: The leaves, whose tensors are all there and of the right shapes.
        tensors: Tensors by key.
        cast: Their element types.

    Raises:
        ValueError: If a tensor holds a NaN or an infinity, or becomes infinite in the element type of its leaf.

    Example:
        >>> tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
        >>> row = Row("a.kernel", (3, 2), "a.weight", True)
        >>> read = read_leaves([row], tensors, Cast(lambda path: "float16"))
        >>> read["a.kernel"].shape
        (3, 2)
    """
    leaves: dict[str, np.ndarray] = {}
    parts: list[_Part] = []
    for row in rows:
        leaf = leaves[row.path] = aligned_empty(row.shape, cast.dtype_of(row.path))
        for layer, key in enumerate(row.keys):
            place = leaf[layer, ...] if row.stacked else leaf
            parts.append(_Part(key, tensors[key], place, row.transposed))
    mapped, computed = list[_Part](), list[_Part]()
    for part in parts:
        (mapped if isinstance(part.tensor, np.ndarray) else computed).append(part)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(_read, mapped):  # raises the error of the first part that has one, and cancels the others
            pass
    for part in computed:
        _read(part)
    return {path: jax.device_put(leaf, may_alias=True) for path, leaf in leaves.items()}


def _read(part: _Part) -> None:
    tensor = np.asarray(part.tensor)
    finite = True
    for expert in np.ndindex(tensor.shape[:-2]):  # once, with (), for matrices and vectors
        source, place = np.atleast_2d(tensor[*expert, ...], part.place[*expert, ...])  # views, of numbers too
        finite &= _fill_matrix(place.T if part.transposed else place, source, STRIP if part.transposed else None)
    if not finite:
        raise ValueError(why_not_finite(part.key, tensor, part.place.dtype))


def _fill_matrix(place: np.ndarray, source: np.ndarray, step: int | None) -> bool:
    """Cast a matrix into its place, ``step`` rows at a time; return whether all that it then holds is finite."""
    step = step or max(1, BLOCK // max(1, source[:1].nbytes))
    finite = True
    for start in range(0, len(source), step):
        with np.errstate(over="ignore"):  # it is reported as an error, with the tensor's key
            strip = source[start : start + step].astype(place.dtype, copy=False)
        finite &= _is_finite(strip)
        place[start : start + step] = strip
    return finite


def _is_finite(array: np.ndarray) -> bool:
    """Whether all elements are finite; of 16-bit types by their bits, which NumPy does ten times faster."""
    if array.dtype not in EXPONENTS:
        return bool(np.isfinite(array).all())
    exponent = EXPONENTS[array.dtype]
    return array.size == 0 or int((array.view(np.uint16) & exponent).max()) < exponent


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array with any contents, whose memory JAX's CPU device takes over without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def why_not_finite(key: str, tensor: np.ndarray, dtype: DTypeLike) -> str:
    """The error message for a tensor whose leaf holds values that are not finite."""
    is_finite = np.isfinite(tensor.astype(np.float32))
    if is_finite.all():
        return f"The checkpoint's tensor '{key}' has values beyond {dtype}. Read it with dtype='bfloat16' or 'float32'."
    count = is_finite.size - int(is_finite.sum())
    return (
        f"The checkpoint's tensor '{key}' holds NaN or infinity in {count} of {is_finite.size} elements. "
        "Take an undamaged copy of the checkpoint."
    )
