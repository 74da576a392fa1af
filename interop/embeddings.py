"""Embeddings of the base that an adapter's file has beside the adapter, as PEFT's ``save_embedding_layers`` has it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from peft_jax.interop.extras import base_matrix
from peft_jax.interop.formats import EMBEDDING_MODULES, PREFIX

from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, find_leaves
from peft_jax.core.paths import TORCH_NAMES
from peft_jax.core.targets import is_saved_module
from peft_jax.methods.base import Method

Tensors = Mapping[str, np.ndarray]


def whole_embeddings(
    params: Any, config: Method, layout: Layouts | None = None, *, values: bool = True
) -> dict[str, np.ndarray]:
    """The input embedding and the output head under PEFT's keys, but for those that the config trains whole.

    A head that is tied to the embedding is there too. Of a bare tree these are the modules that are called so.

    Args:
        params: A tree or model handle.
        config: The adapter's config.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
        values: Whether their numbers are needed; else they are zeros that take no memory.
    """
    tree = params.params if isinstance(params, Handle) else params
    layouts = {**params.layouts(), **(layout or {})} if isinstance(params, Handle) else layout
    found, tensors = find_leaves(tree, layouts, config.fan_in_fan_out), {}
    for leaf in found:
        for index in np.ndindex(leaf.names.shape):
            for name in _names(params, str(leaf.names[index])):
                end = TORCH_NAMES.get(leaf.path.rsplit(".", 1)[-1])
                if end and leaf.layout is not None and not is_saved_module(config, name):
                    tensors[f"{PREFIX}{name}.{end}"] = base_matrix(leaf, index, config, values=values)
    return tensors


def _names(params: Any, module: str) -> set[str]:
    """Which of the input embedding and the output head have the leaf of a module."""
    if not isinstance(params, Handle):
        return {module} if module.rsplit(".", 1)[-1] in EMBEDDING_MODULES else set()
    tied = set(params.tied_modules) if module in params.tied_modules else set()
    return {module, *tied} & {params.input_module, params.output_module}


def without_embeddings(
    params: Any, config: Method, tensors: Tensors, layout: Layouts | None = None, *, values: bool = True
) -> Tensors:
    """The tensors of a file without the base's embeddings, which ``save_embedding_layers=True`` puts there.

    Args:
        params: A tree or model handle.
        config: The adapter's config.
        tensors: The tensors.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
        values: Whether their numbers are compared with this base's, not their shapes alone.

    Raises:
        ValueError: if one of them differs from this base's.
    """
    known = whole_embeddings(params, config, layout, values=False)
    if not known.keys() & tensors.keys():
        return tensors
    copies = whole_embeddings(params, config, layout) if values else known
    for key in sorted(copies.keys() & tensors.keys()):
        is_copy = tensors[key].shape == copies[key].shape
        if is_copy and values:
            is_copy = np.array_equal(tensors[key].astype(copies[key].dtype), copies[key])
        if not is_copy:
            raise ValueError(
                f"The adapter does not fit this base: {key} of shape {tensors[key].shape} differs from this base's of "
                f"shape {copies[key].shape}. Load it on the base that it was made for, with its embeddings as large."
            )
    return {key: tensor for key, tensor in tensors.items() if key not in copies}
