"""The leaves of a quantized checkpoint that stay in the checkpoint's own bits, and the line that says so."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.core.pytree import PyTree
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.files import some
from peft_jax.interop.packed_codes import Form, Kept, Packed
from peft_jax.models.config import ModelConfig
from peft_jax.models.family import leaf_at
from peft_jax.models.load_rounding import matrix_layout
from peft_jax.quant.quantized import nbytes


def kept_leaves(
    model: ModelConfig, rows: Sequence[Row], tensors: Mapping[str, Any], dtype_of: Callable[[str], jnp.dtype]
) -> dict[str, Kept]:
    """How the leaves are kept that a weight of `peft_jax.quant` holds exactly, by path.

    They are matrices whose tensors, those of all layers, are of one form, and have the inputs that share a scale along
    the inputs of the leaf. The others are dequantized.

    Args:
        model: The architecture.
        rows: Its leaves.
        tensors: The checkpoint's tensors by key.
        dtype_of: The element type that a leaf is to have, by its path.
    """
    found = {}
    for row in rows:
        layout, form = matrix_layout(model, row, outside=True), _form(row, tensors)
        if layout is not None and form is not None and _fits(row, layout, form):
            found[row.path] = Kept(form, layout, dtype_of(row.path))
    return found


def _form(row: Row, tensors: Mapping[str, Any]) -> Form | None:
    """The form that all tensors of a leaf have."""
    forms = set()
    for key in row.keys:
        tensor = tensors.get(key)
        forms.add(tensor.form() if isinstance(tensor, Packed) else None)
    return forms.pop() if len(forms) == 1 else None


def _fits(row: Row, layout: Layout, form: Form) -> bool:
    """Whether a leaf is ``(in, out)``, perhaps with the layers in front, as the weight of its tensors is."""
    axes = (len(layout.stack), len(layout.inp), len(layout.out))
    in_order = layout.order == tuple(range(len(row.shape)))
    return in_order and axes == (int(row.stacked), 1, 1) and row.transposed != form.is_transposed


def refuse_options(name_or_path: str | os.PathLike[str], tensors: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise ValueError if ``keep_quantized`` has nothing to keep, or another option quantizes the weights anew."""
    given = [name for name, value in others.items() if value]
    if given:
        raise ValueError(
            f"keep_quantized=True and {given[0]} exclude each other: the weights stay as the checkpoint has them, or "
            "they are quantized anew. Give one of them."
        )
    if not any(isinstance(tensor, Packed) and tensor.is_quantized for tensor in tensors.values()):
        raise ValueError(
            f"keep_quantized=True, but '{name_or_path}' holds no quantized weights. Leave it out, or write "
            "load_in_8bit=True or load_in_4bit=True to quantize them."
        )


def kept_notice(
    name_or_path: str | os.PathLike[str],
    words: str,
    rows: Sequence[Row],
    kept: Mapping[str, Kept],
    tensors: Mapping[str, Any],
    params: PyTree,
    dtype: jnp.dtype,
) -> str:
    """One line on how many quantized weights are kept and how many are not, and the bytes of both.

    Args:
        name_or_path: The checkpoint.
        words: The number of its quantized weights, and their bytes.
        rows: The leaves.
        kept: Those that are kept.
        tensors: The tensors by key.
        params: The parameters.
        dtype: Their element type.
    """
    keys = {key for row in rows if row.path in kept for key in row.keys}
    packed = {key: one for key, one in tensors.items() if isinstance(one, Packed) and one.is_quantized}
    rest = sorted(packed.keys() - keys)
    size = sum(nbytes(leaf_at(params, path)) for path in kept)
    told = f"'{name_or_path}' has {words}. {len(keys)} of them stay in their own bits in {size:,} bytes"
    if not rest:
        return f"{told}."
    elements = sum(math.prod(packed[key].shape) for key in rest)
    dense = elements * jnp.dtype(dtype).itemsize
    return f"{told}; {len(rest)} are dequantized to {jnp.dtype(dtype)} in {dense:,} bytes: {some(rest)}."
