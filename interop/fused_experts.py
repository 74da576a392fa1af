"""Experts that a checkpoint holds one by one, as the fused tensors of a model, and the way back."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.files import CONFIG, LazyArray, some

from peft_jax.core.float_types import wider_float


class FusedTensor:
    """A tensor whose parts lie in a checkpoint one by one; they are put together when it is read.

    Args:
        parts: The parts of each expert ``[part][expert]``, each ``(out, in)``; parts follow one another along ``out``.
    """

    def __init__(self, parts: Sequence[Sequence[LazyArray]]) -> None:
        self.parts = parts
        out, n_in = sum(part[0].shape[0] for part in parts), parts[0][0].shape[1]
        self.shape = (len(parts[0]), out, n_in)
        self.dtype = np.dtype(functools.reduce(wider_float, [part[0].dtype for part in parts]))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def __len__(self) -> int:
        """Count the experts."""
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The tensor ``(experts, out, in)``."""
        whole = np.empty(self.shape, self.dtype)
        start = 0
        for part in self.parts:
            stop = start + part[0].shape[0]
            for expert, tensor in enumerate(part):
                whole[expert, start:stop] = np.asarray(tensor)
            start = stop
        return whole if dtype is None else whole.astype(dtype)


def with_fused_experts(tensors: Mapping[str, LazyArray], rows: Sequence[Row]) -> dict[str, LazyArray]:
    """The tensors of a checkpoint with fused ones in place of those that it holds one by one.

    Args:
        tensors: Tensors by key, fused or one by one.
        rows: What the model's tree consists of; their ``parts`` say how single tensors are called.

    Raises:
        ValueError: Some of the single tensors are missing or left over, or their shapes differ.
    """
    found = dict(tensors)
    for row in rows:
        if not row.parts:
            continue
        for key, names in zip(row.keys, row.part_keys, strict=True):
            single = list(itertools.chain(*names))
            if key in tensors or tensors.keys().isdisjoint(single):
                continue
            found[key] = _joined(row, names, tensors)
            for name in single:
                del found[name]
    return found


def _joined(row: Row, names: Sequence[Sequence[str]], tensors: Mapping[str, LazyArray]) -> LazyArray:
    """One tensor of a row, of its single ones."""
    missing = set(itertools.chain(*names)) - tensors.keys()
    if missing:
        raise ValueError(
            f"The checkpoint's tensors do not fit its {CONFIG}. missing: {some(sorted(missing))}. "
            "Use the config of these weights, and all files of the checkpoint."
        )
    if len(row.tensor_shape) == 2:
        return tensors[names[0][0]]
    *_, out, n_in = row.tensor_shape
    want = (out // len(names), n_in)
    for name in itertools.chain(*names):
        if tensors[name].shape != want:
            raise ValueError(
                f"The checkpoint's tensors do not fit its {CONFIG}. of a wrong shape: {name} {tensors[name].shape}, "
                f"not {want}. Use the config of these weights."
            )
    parts = []
    for of_experts in names:
        parts.append([tensors[name] for name in of_experts])
    return FusedTensor(parts)
