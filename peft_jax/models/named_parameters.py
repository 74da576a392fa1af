"""Parameters of a model under the names that they have in PyTorch: transformers', and PEFT's where it has adapters."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted, changed_layers, nested_adapters
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf, find_leaves, module_names
from peft_jax.core.merge import unload
from peft_jax.core.paths import named_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import is_weight
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.formats import PREFIX, ROWS, is_fixed, tensor_key
from peft_jax.interop.tensors import get_peft_model_state_dict
from peft_jax.methods.own_tensors import OwnTensors
from peft_jax.methods.roles import REPLACED, SAVED, Whole
from peft_jax.methods.trainable_tokens import Tokens


class Parameter(NamedTuple):
    """A parameter under PyTorch's name; the array is made when it is asked for.

    Attributes:
        name: Its key in PyTorch's ``state_dict``.
        make: A function that gives it as a NumPy array, in PyTorch's orientation.
        requires_grad: Whether it is trained.
    """

    name: str
    make: Callable[[], np.ndarray]
    requires_grad: bool


def named(handle: Handle, rows: tuple[Row, ...]) -> Iterator[Parameter]:
    """The parameters of a handle, the base's first, then each adapter's.

    Args:
        handle: A base model, or one with adapters.
        rows: The tensors of its checkpoint.
    """
    tree: PyTree = handle.params
    base = named_leaves(unload(tree), is_leaf=is_weight)
    known = adapters(tree)
    prefix = PREFIX if known else ""
    inside, blocks = _inside(tree), _blocks(known.values())
    tensors = dict(_of_adapters(handle, known))
    for row in rows:
        for layer, key in enumerate(row.keys):
            module, _, end = key.rpartition(".")
            name = f"{prefix}{_in_block(module, blocks)}{inside.get(module, '')}.{end}"
            if name not in tensors:
                yield Parameter(name, partial(_tensor, base[row.path], row, layer), False)
    for name, (array, trained) in tensors.items():
        yield Parameter(name, partial(np.asarray, array), trained)


def _tensor(leaf: Any, row: Row, layer: int) -> np.ndarray:
    """One tensor of a base's leaf, dense."""
    array = leaf.dense() if is_weight(leaf) else jnp.asarray(leaf)
    one = np.asarray(array[layer] if row.stacked else array)
    return np.ascontiguousarray(one.T if row.transposed else one)


def _inside(tree: PyTree) -> dict[str, str]:
    """The path that PEFT puts between a module's path and its base's parameters, by module."""
    found: dict[str, str] = {}
    for leaf in find_leaves(tree, None):
        for node in nested_adapters(leaf.value).values():
            part = _wrapper(node)
            if not part:
                continue
            changed = changed_layers(node)
            for index in np.ndindex(leaf.names.shape):
                if np.all(changed[index] if changed.ndim else changed):
                    found[str(leaf.names[index])] = part
    return found


def _blocks(configs: Iterable[Any]) -> set[str]:
    """The paths of the layers that PEFT wraps as wholes."""
    found: set[str] = set()
    for config in configs:
        if isinstance(config, OwnTensors):
            found.update(config.wrapped_layers)
    return found


def _in_block(module: str, blocks: Collection[str]) -> str:
    """The path of a module in PEFT's model, where it may be in a layer that is wrapped."""
    for block in blocks:
        if module.startswith(f"{block}."):
            return f"{block}.base_layer{module.removeprefix(block)}"
    return module


def _wrapper(node: Adapted) -> str:
    """The path of the base inside of PEFT's layer for one adapted leaf."""
    role = node.tag.role
    if role is None:
        return "" if node.tag.config.on_model else ".base_layer"
    if isinstance(role, Tokens):
        return ".token_adapter.base_layer"
    if isinstance(role, Whole) and role.name == SAVED:
        return ".original_module"
    return ".base_layer" if role == Whole(REPLACED) else ""


def _of_adapters(handle: Handle, known: dict[str, Any]) -> Iterator[tuple[str, tuple[np.ndarray, bool]]]:
    """Name, array and whether it is trained of the tensors of all adapters."""
    tree = handle.params
    leaves = find_leaves(tree, None)
    modules = set(module_names(leaves))
    for adapter in known:
        nodes = [(leaf, nested_adapters(leaf.value).get(adapter)) for leaf in leaves]
        saved = set()
        trained = False
        for leaf, node in nodes:
            if node is None:
                continue
            trained = trained or (node.active and node.trainable)
            if node.tag.role == Whole(SAVED):
                saved |= set(leaf.modules)
        shared = _led_by_others(nodes)
        config = known[adapter]
        own = config if isinstance(config, OwnTensors) else None
        unread = set() if own is None else own.unread_keys
        for key, array in get_peft_model_state_dict(handle, adapter, save_embedding_layers=False).items():
            # Places are no parameters in PEFT's model, and PyTorch names a shared one once.
            if np.issubdtype(array.dtype, np.integer) or key in shared:
                continue
            own_name = None if own is None else own.own_name(key, adapter)
            name = own_name or _with_name(key, adapter, modules, saved)
            yield name, (array, trained and not is_fixed(key) and key not in unread)


def _led_by_others(nodes: Iterable[tuple[Leaf, Adapted | None]]) -> set[str]:
    """The keys of arrays that layers take from another one of their group."""
    found = set()
    for leaf, node in nodes:
        if node is None or node.tag.places is None:
            continue
        config, places = node.tag.config, node.tag.places
        suffixes = {row.role: row.suffix for row in ROWS[config.peft_type][False]}
        for role in config.carried:
            names = np.ravel(leaf.names)[~places.leads(role)]
            found |= {tensor_key(config.peft_type, str(name), suffixes[role]) for name in names}
    return found


def _with_name(key: str, adapter: str, modules: set[str], saved: set[str]) -> str:
    """The key of an adapter's tensor in a model, where it has the adapter's name."""
    path = key.removeprefix(PREFIX)
    module = path.rpartition(".")[0]
    while module and module not in modules:
        module = module.rpartition(".")[0]
    if not module:
        owner, _, number = key.rpartition(".")
        return f"{owner}.{adapter}.{number}" if number.isdecimal() else f"{key}.{adapter}"
    end = path[len(module) + 1 :]
    if end.startswith("base_layer."):
        return key
    if module in saved:
        return f"{PREFIX}{module}.modules_to_save.{adapter}.{end}"
    first, *rest = end.split(".")
    if first == "lora_magnitude_vector":  # a module in a model, and a tensor in a file
        rest = ["weight"]
    if first in ("token_adapter", "base_layer") and rest:
        first, *rest = f"{first}.{rest[0]}", *rest[1:]
    return PREFIX + ".".join([module, first, adapter, *rest])
