"""Tensors in PEFT's files beside an adapter's own: bases of embeddings, biases and shared arrays again."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
from peft_jax.interop.formats import (
    COPIED_IN_LAYERS,
    EMBEDDING_MODULES,
    PREFIX,
    SHARED,
    TIED,
    TOKEN_SUFFIX,
    Row,
    tensor_key,
)

from peft_jax.core.adapted import is_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf
from peft_jax.core.pytree import PyTree
from peft_jax.core.targets import names_some, saved_owner
from peft_jax.core.weight import as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.trainable_tokens import tokens_by_module, trains_tokens

COPIES = r"\.(original_module|modules_to_save)\.(.*\.)?bias"


def at_the_ends(params: PyTree, adapted: set[str]) -> set[str]:
    """Those of the adapted modules that are a model's input embedding and output head; names tell for a bare tree.

    Where the stacks of a model share an embedding, their own names of it are neither for PEFT.
    """
    if isinstance(params, Handle):
        return adapted & {params.input_module, params.output_module}
    return set(filter(_is_embedding, adapted))


def base_tensors(leaf: Leaf, config: Method, stored: set[str]) -> dict[str, np.ndarray]:
    """The base weight that PEFT stores beside an adapter on the modules ``stored``, a model's embedding and head."""
    if trains_tokens(config) or not targets_embedding(config, stored):
        return {}
    found = {}
    for index in np.ndindex(leaf.names.shape):
        name = str(leaf.names[index])
        if name in stored:
            found[f"{PREFIX}{name}.base_layer.weight"] = base_matrix(leaf, index, config)
    return found


def tied_copies(handle: Handle, config: Method, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors that PEFT stores once more under the names of tied modules, where an adapter keeps them tied."""
    copies = {}
    owner, *others = handle.tied_modules if config.ensure_weight_tying and handle.tied_modules else ("",)
    for other in others:
        for key, tensor in tensors.items():
            end = key.removeprefix(f"{PREFIX}{owner}.")
            if end not in (key, TOKEN_SUFFIX):
                turned = tensor.T if end in TIED else tensor
                copies[f"{PREFIX}{other}.{TIED.get(end, end)}"] = np.ascontiguousarray(turned)
    return copies


def without_tied_copies(handle: Handle, config: Method, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a file without those of `tied_copies`, as far as they are copies."""
    left = dict(tensors)
    for key, copy in (tied_copies(handle, config, tensors) | _token_copies(handle, config, tensors)).items():
        if key in left and np.array_equal(left[key], copy):
            del left[key]
    return left


def _token_copies(handle: Handle, config: Method, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vectors of trained tokens under the names of tied modules, as ``save_embedding_layers=True`` has them."""
    owner, *others = handle.tied_modules or ("",)
    key = f"{PREFIX}{owner}.{TOKEN_SUFFIX}"
    tokens = tokens_by_module(config.trainable_token_indices, handle.tied_modules, handle.input_module, strict=False)
    alike = [other for other in others if tokens.get(other) in (None, tokens.get(owner))]
    return {f"{PREFIX}{other}.{TOKEN_SUFFIX}": tensors[key] for other in alike} if key in tensors else {}


def copied_biases(
    leaf: Leaf, adapted: np.ndarray, config: Method, tensors: Mapping[str, np.ndarray], adapter_name: str
) -> dict[str, np.ndarray]:
    """The base's and the trained bias of a saved module, once more under the names of PEFT's wrapper.

    With ``bias="all"`` PEFT stores whatever is called a bias. It has no use for these when it reads them (some are
    keys that it does not expect), so they are written only where they were read.
    """
    if config.bias != "all" or not leaf.is_bias:
        return {}
    found = {}
    for index in zip(*np.nonzero(adapted), strict=True) if adapted.ndim else [()]:
        name = str(leaf.names[index])
        owner = saved_owner(config, name)
        if owner is not None:
            rest = name.removeprefix(owner).removeprefix(".")
            inside = f"{rest}.bias" if rest else "bias"
            trained = tensors[f"{PREFIX}{name}.bias"]
            found[f"{PREFIX}{owner}.original_module.{inside}"] = _base(leaf)[index]
            found[f"{PREFIX}{owner}.modules_to_save.{adapter_name + '.' if rest else ''}{inside}"] = trained
    return found


def without_copies(config: Method, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The tensors of a file without those of `copied_biases`, and of `copies_in_layers` that are equal to the whole."""
    left = dict(tensors)
    for key, tensor in tensors.items():
        whole = copied_whole(config, key)
        is_bias = config.bias == "all" and config.modules_to_save and re.search(COPIES, key)
        if is_bias or (whole in tensors and np.array_equal(tensors[whole], tensor)):
            del left[key]
    return left


def copied_whole(config: Method, key: str) -> str:
    """The key of the shared array that a key in a layer is a copy of; empty for other keys."""
    if config.peft_type not in COPIED_IN_LAYERS or not key.startswith(PREFIX):
        return ""
    wholes = {row.role: row.suffix for row in SHARED[config.peft_type]}
    return wholes.get(key.rpartition(".")[2], "")


def copies_in_layers(
    config: Method, row: Row, shared: Mapping[str, np.ndarray], adapted: Iterable[str]
) -> dict[str, np.ndarray]:
    """A shared array once more for each of the ``adapted`` modules, for the methods that PEFT does so for."""
    if config.peft_type not in COPIED_IN_LAYERS:
        return {}
    return {tensor_key(config.peft_type, module, row.role): shared[row.suffix] for module in adapted}


def is_transposed(leaf: Leaf, config: Method) -> bool:
    """Whether PyTorch stores the leaf as ``(out, in)``."""
    known = leaf.layout.stored_in_out
    in_out = config.fan_in_fan_out if known is None else known
    return bool(leaf.layout.inp) and not leaf.layout.lookup and not in_out


def base_matrix(leaf: Leaf, index: tuple[int, ...], config: Method, *, values: bool = True) -> np.ndarray:
    """A layer's weight without adapters, as PyTorch has it; without ``values`` zeros that take no memory."""
    if not values:
        shape = leaf.layout.sizes(leaf.value.shape) if leaf.layout.inp else leaf.layout.sizes(leaf.value.shape)[1:]
        return np.broadcast_to(np.float32(0), shape[::-1] if is_transposed(leaf, config) else shape)
    matrix = _base(leaf)[index]
    return np.ascontiguousarray(matrix.T if is_transposed(leaf, config) else matrix)


def _base(leaf: Leaf) -> np.ndarray:
    base = leaf.value
    while is_adapted(base):
        base = base.base
    return np.asarray(leaf.layout.matrix(as_weight(base, leaf.layout).dense()))


def targets_embedding(config: Method, adapted: Iterable[str]) -> bool:
    """PEFT's rule (``save_embedding_layers="auto"``): a list names the module itself, or a regex matches it."""
    targets = config.target_modules or ()
    if isinstance(targets, str):
        return names_some(targets, filter(_is_embedding, adapted))
    return not set(targets).isdisjoint(EMBEDDING_MODULES)


def _is_embedding(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in EMBEDDING_MODULES
