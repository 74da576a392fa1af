"""Tensors of the base in an adapter's file: its embedding and head, as PEFT's ``save_embedding_layers`` has them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peft_jax.interop.extras import base_matrix, is_transposed, without_copies
from peft_jax.interop.formats import EMBEDDING_MODULES, PREFIX, PREFIXES

from peft_jax.core.adapted import is_adapted
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, find_leaves, replace_leaves
from peft_jax.core.paths import TORCH_NAMES
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import without
from peft_jax.core.targets import is_target, saved_owner
from peft_jax.core.weight import is_weight
from peft_jax.methods.base import Method
from peft_jax.methods.trainable_tokens import tokens_by_module

Tensors = Mapping[str, np.ndarray]
ORIGINAL, TRAINED, TOKENS, ADAPTED = "original_module", "modules_to_save", "token_adapter.base_layer", "base_layer"
FAR = 0.5  # a table that is further from the base's, by their norms, is that of another base


class Tables(NamedTuple):
    """An adapter's file and a base, with the tables of the base that the file brings in their places.

    Attributes:
        params: The base, with these tables.
        tensors: The tensors of the file that are not the base's.
        modules: Names of the modules whose table was in the file.
        problems: Why a table does not fit this base.
    """

    params: PyTree
    tensors: Tensors
    modules: frozenset[str]
    problems: list[str]


class Place(NamedTuple):
    """A tensor of the base's embedding or head: its leaf, its layer in that, the module, and its name in PyTorch."""

    position: int
    leaf: Leaf
    layer: tuple[int, ...]
    module: str
    end: str


def whole_embeddings(params: PyTree, config: Method, layout: Layouts | None = None) -> dict[str, np.ndarray]:
    """The input embedding and the output head under PEFT's keys, as ``save_embedding_layers=True`` writes them.

    A head that is tied to the embedding is there too, and so is the trained copy of a module that is trained whole.
    Of a bare tree these are the modules that are called so.

    Args:
        params: A tree or model handle.
        config: The adapter's config.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
    """
    tensors = {}
    for place in _places(params, config, layout):
        for holder in _holders(params, config, place.module):
            tensors[f"{_prefix(config)}{holder}.{place.end}"] = base_matrix(place.leaf, place.layer, config)
    return tensors


def trained_copies(params: PyTree, config: Method, tensors: Tensors) -> dict[str, np.ndarray]:
    """The embedding and the head that are trained whole, once more under the names of PEFT's wrapper."""
    copies = {}
    for place in _places(params, config, None):
        if saved_owner(config, place.module) == place.module:
            key = f"{_prefix(config)}{place.module}.{TRAINED}.{place.end}"
            copies[key] = tensors[_plain_key(config, place)]
    return copies


def with_tables(
    params: PyTree, config: Method, tensors: Tensors, layout: Layouts | None = None, *, values: bool = True
) -> Tables:
    """The base with the embedding and the head of a file, where it has them; PEFT reads them in the same way.

    PEFT puts each tensor where its key is, and passes over a copy that has the key of another wrapper than the one
    that is there. Such a copy has to be what the base has then.

    Args:
        params: A tree or model handle.
        config: The adapter's config.
        tensors: The tensors.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
        values: Whether there are numbers to put and to compare, not shapes alone.
    """
    rest, problems = dict(without_copies(config, tensors)), []
    biases = without(tensors, rest)  # they belong to ``bias="all"``
    found = list(_places(params, config, layout))
    if config.peft_type in PREFIXES and not all(_plain_key(config, place) in tensors for place in found):
        found = []  # a prompt changes neither, and PEFT writes both of them or none
    brought: dict[int, dict[str, np.ndarray]] = {}
    others: dict[str, Place] = {}
    places: dict[int, Place] = {}
    modules = set()
    for place in found:
        shape = base_matrix(place.leaf, place.layer, config, values=False).shape
        for key, is_used in _keys(params, config, place).items():
            if key not in rest:
                continue
            tensor = rest.pop(key)
            if tensor.shape != shape:
                problems.append(f"{key} of shape {tensor.shape} differs from this base's of shape {shape}")
                if isinstance(params, Handle) and tensor.shape[1:] == shape[1:]:
                    problems[-1] += f": write model.resize_token_embeddings({tensor.shape[0]}) first"
            elif is_used:
                brought.setdefault(place.position, {})[key] = tensor
                places[place.position] = place
                modules.add(place.module)
            else:
                others[key] = place
    rest = {**_without_trained(params, config, rest), **biases}
    if not values or problems:
        return Tables(params, rest, frozenset(), problems)
    nodes = {}
    for position, tables in brought.items():
        place = places[position]
        problems += _conflicts(tables, base_matrix(place.leaf, place.layer, config), place.leaf)
        if not problems:
            nodes[position] = _with_table(place, next(iter(tables.values())), config)
    problems += _ignored(others, nodes, tensors, config)
    tree = replace_leaves(params.params if isinstance(params, Handle) else params, nodes)
    changed = params.replace(tree) if isinstance(params, Handle) else tree
    return Tables(changed if nodes else params, rest, frozenset(modules), problems)


def _places(params: PyTree, config: Method, layout: Layouts | None) -> Iterator[Place]:
    """The tensors of the input embedding and the output head."""
    tree = params.params if isinstance(params, Handle) else params
    layouts = {**params.layouts(), **(layout or {})} if isinstance(params, Handle) else layout
    for position, leaf in enumerate(find_leaves(tree, layouts, config.fan_in_fan_out)):
        end = TORCH_NAMES.get(leaf.path.rsplit(".", 1)[-1])
        if end is None or leaf.layout is None:
            continue
        for index in np.ndindex(leaf.names.shape):
            for name in sorted(_names(params, str(leaf.names[index]))):
                yield Place(position, leaf, index, name, end)


def _names(params: PyTree, module: str) -> set[str]:
    """Which of the input embedding and the output head have the leaf of a module."""
    if not isinstance(params, Handle):
        return {module} if module.rsplit(".", 1)[-1] in EMBEDDING_MODULES else set()
    tied = set(params.tied_modules) if module in params.tied_modules else set()
    return {module, *tied} & {params.input_module, str(params.output_module)}


def _prefix(config: Method) -> str:
    return PREFIXES.get(config.peft_type, PREFIX)


def _plain_key(config: Method, place: Place) -> str:
    """The key of a tensor of a module that no adapter is on."""
    return f"{_prefix(config)}{place.module}.{place.end}"


def _holders(params: PyTree, config: Method, module: str) -> set[str]:
    """The paths under which PEFT has the base of a module, given an adapter on it and those that are there already."""
    tree = params.params if isinstance(params, Handle) else params
    found = set()
    for one in [config, *adapters(tree).values()]:
        if (owner := saved_owner(one, module)) is not None:
            found.add(f"{owner}.{ORIGINAL}{module.removeprefix(owner)}")
        elif _has_tokens(params, one, module):
            found.add(f"{module}.{TOKENS}")
        elif is_target(one, module):
            found.add(f"{module}.{ADAPTED}")
    return found or {module}


def _has_tokens(params: PyTree, config: Method, module: str) -> bool:
    """Whether PEFT trains tokens of a module, or of the embedding that it is tied to, and adapts it in no other way."""
    if not isinstance(params, Handle):
        return module in tokens_by_module(config.trainable_token_indices, [module], EMBEDDING_MODULES[0], strict=False)
    names = {params.input_module, str(params.output_module), *params.tied_modules}
    tokens = tokens_by_module(config.trainable_token_indices, names, params.input_module, strict=False)
    is_tied = module in params.tied_modules and params.input_module in tokens
    return module in tokens or is_tied and not is_target(config, module)


def _keys(params: PyTree, config: Method, place: Place) -> dict[str, bool]:
    """The keys that a file may have for a tensor of the base, and whether PEFT reads what is there.

    Where modules share a leaf, what is put into one is put into all of them.
    """
    used = {f"{one}.{place.end}" for one in _holders(params, config, place.module)}
    owner = saved_owner(config, place.module)
    known = [f"{place.module}.{inside}.{place.end}" for inside in (ORIGINAL, TOKENS, ADAPTED)]
    if owner is None:
        known.append(f"{place.module}.{place.end}")
    else:
        known.append(f"{owner}.{ORIGINAL}{place.module.removeprefix(owner)}.{place.end}")
    is_tied = isinstance(params, Handle) and place.module in params.tied_modules
    return {_prefix(config) + name: is_tied or name in used for name in known}


def _without_trained(params: PyTree, config: Method, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without those of `trained_copies`, as far as they are copies."""
    rest = dict(tensors)
    for key, tensor in tensors.items():
        head, is_copy, end = key.rpartition(f".{TRAINED}.")
        trained = tensors.get(f"{head}.{end}")
        if is_copy and trained is not None and saved_owner(config, head.removeprefix(_prefix(config))) is not None:
            if np.array_equal(trained, tensor):
                del rest[key]
    return rest


def _conflicts(tables: Mapping[str, np.ndarray], base: np.ndarray, leaf: Leaf) -> list[str]:
    """Why a leaf does not take tables, which are all for it."""
    (first, table), *others = tables.items()
    wide, own = table.astype(np.float32), base.astype(np.float32)
    if np.linalg.norm(wide - own) > FAR * np.linalg.norm(own):
        if first.endswith(f".{ADAPTED}.weight"):
            return [f"{first} differs from this base's throughout"]
        return [f"{first} of shape {table.shape} differs from this base's of shape {base.shape} throughout"]
    for key, other in others:
        if not same_but_for_rounding(table, other):
            return [f"{first} and {key} differ, and this base has one table for both"]
    if _is_quantized(leaf.value) and not np.array_equal(table.astype(base.dtype), base):
        return [f"{first} differs from this base's, which is quantized and takes no other: load the base unquantized"]
    return []


def _ignored(others: Mapping[str, Place], nodes: Mapping[int, Any], tensors: Tensors, config: Method) -> list[str]:
    """The copies that PEFT does not read and that are not what the base has."""
    problems = []
    for key, place in others.items():
        leaf = place.leaf._replace(value=nodes.get(place.position, place.leaf.value))
        if not same_but_for_rounding(tensors[key], base_matrix(leaf, place.layer, config)):
            problems.append(
                f"{key} differs from this base's and belongs to another adapter, so that PEFT does not read it: save "
                "the adapter again with save_embedding_layers=False"
            )
    return problems


def same_but_for_rounding(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal as far as the narrower of their element types tells.

    Example:
        >>> same_but_for_rounding(np.float32([1 / 3]), np.float16([1 / 3]))
        True
    """
    if one.shape != other.shape:
        return False
    step = max(float(jnp.finfo(array.dtype).eps) for array in (one, other))
    left, right = one.astype(np.float32), other.astype(np.float32)
    return bool(np.all(np.abs(left - right) <= step * np.abs(right)))


def _is_quantized(leaf: Any) -> bool:
    while is_adapted(leaf):
        leaf = leaf.base
    return is_weight(leaf)


def _with_table(place: Place, table: np.ndarray, config: Method) -> Any:
    """A leaf, with the adapters on it, whose base has a table of a file in the base's element type."""
    leaf = place.leaf
    base = leaf.value
    while is_adapted(base):
        base = base.base
    if _is_quantized(base):
        return leaf.value
    matrices = np.array(leaf.layout.matrix(base))
    matrices[place.layer] = (table.T if is_transposed(leaf, config) else table).astype(base.dtype)
    array = leaf.layout.unmatrix(jnp.asarray(matrices), base.shape)
    if isinstance(base, jax.Array):
        array = jax.device_put(array, base.sharding)
    return _on_base(leaf.value, array)


def _on_base(leaf: Any, base: Any) -> Any:
    """A leaf with its adapters, and another base."""
    return dataclasses.replace(leaf, base=_on_base(leaf.base, base)) if is_adapted(leaf) else base
