"""Put another adapter's file in the place of an adapter, so that compiled functions run on without compiling again.

The jobs of PEFT 0.21.2's ``utils/hotswap.py``. Scales and ranks are arrays here, so that they may differ as they are;
for unlike ranks the factors need room, which `prepare_model_for_compiled_hotswap` makes.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import TypeVar, Unpack

import jax
import jax.numpy as jnp
from peft_jax.interop.adapter import load_adapter
from peft_jax.interop.tensors import adapter_config

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.hub import HubOptions
from peft_jax.core.merge import unload
from peft_jax.methods.base import Method
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.variants import chosen, variant_of
from peft_jax.prompts.xlora import NUMBER, XLoraConfig

T = TypeVar("T")
FACTORS = {"lora_A": -1, "lora_B": -2}  # the axis of the rank


def prepare_model_for_compiled_hotswap(model: T, *, target_rank: int | None = None) -> T:
    """The tree or handle whose LoRAs have room for a higher rank; they compute what they did.

    Compile after this. Scales need no preparation here.

    Args:
        model: A tree or model handle with one LoRA or more.
        target_rank: The largest rank of all adapters that will be swapped in; None changes nothing.

    Raises:
        ValueError: if there is no LoRA, or one has a higher rank than this, or is on a convolution with groups.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(r=2, target_modules=["q"])
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 8))}}, config)
        >>> params = prepare_model_for_compiled_hotswap(params, target_rank=6)
        >>> params["q"]["kernel"].params["lora_A"].shape, int(params["q"]["kernel"].state["rank"])
        ((4, 6), 2)
    """
    nodes = [node for _, node in adapted_leaves(model) if _has_factors(node)]
    if not nodes:
        raise ValueError("The model has no LoRA. Load the first adapter before prepare_model_for_compiled_hotswap.")
    if target_rank is None:
        return model
    rank = target_rank

    def widened(path: str, node: Adapted) -> Adapted:
        if not _has_factors(node):
            return node
        arrays = {**node.state, **node.params}
        found = arrays["lora_A"].shape[-1]
        if found > rank:
            raise ValueError(f"target_rank={rank} is below {found}, the rank of adapter '{node.tag.name}' at '{path}'.")
        if node.layout.groups > 1 and found < rank:
            raise ValueError(
                f"'{path}' is a convolution of {node.layout.groups} groups, each with its part of the rank, which gets "
                f"no room. Give all adapters the rank {found}, and leave target_rank out."
            )
        if (variant := variant_of(node.tag.config)) and found < rank:
            raise ValueError(
                f"'{path}' has {variant}, whose arrays get no room for another rank. Give all adapters the rank "
                f"{found}, and leave target_rank out."
            )
        params, state = dict(node.params), dict(node.state)
        for name, axis in FACTORS.items():
            holder = params if name in params else state  # a factor may be frozen
            holder[name] = _padded(arrays[name], axis, rank)
        return dataclasses.replace(node, params=params, state=state)

    wider: T = map_adapted(widened, model)
    return wider


def hotswap_adapter(
    model: T, model_name_or_path: str | os.PathLike[str], adapter_name: str, **hub: Unpack[HubOptions]
) -> T:
    """The tree or handle with another adapter's file in place of an adapter, which keeps its name.

    All shapes and all else that a program is compiled for stay as they are, so that a function that was compiled for
    the model runs on. A module that the new adapter leaves out is as in the base from then on.

    Args:
        model: A tree or model handle with the adapter.
        model_name_or_path: Folder or hub id of the new one.
        adapter_name: Name of the one to replace.
        **hub: Where on the hub, as in `peft_jax.interop.load_adapter`.

    Raises:
        ValueError: if there is no such adapter, or the new one would not run in the same program: it is of another
            method or has an option that a program depends on, is on other leaves, or has a higher rank than there is
            room for.

    Example:
        >>> import tempfile, peft_jax as pj
        >>> base = {"q": {"kernel": jnp.ones((4, 8))}}
        >>> config = pj.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
        >>> params = pj.apply_lora(base, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pj.interop.save_adapter(pj.apply_lora(base, config.replace(r=1, lora_alpha=5)), folder)
        ...     params = hotswap_adapter(params, folder, "default")
        >>> params["q"]["kernel"].params["lora_A"].shape, float(params["q"]["kernel"].state["scaling"])
        ((4, 2), 5.0)
    """
    tree = model.params if isinstance(model, Handle) else model
    old_config = adapter_config(tree, adapter_name)
    old = {path: node for path, node in adapted_leaves(tree) if node.tag.name == adapter_name}
    layout = None
    if not isinstance(model, Handle):
        layout = {re.escape(path): node.layout for path, node in old.items()}
    loaded = load_adapter(
        unload(model),
        model_name_or_path,
        adapter_name=adapter_name,
        is_trainable=not old_config.inference_mode,
        layout=layout,
        **hub,
    )
    new_tree = loaded.params if isinstance(loaded, Handle) else loaded
    config = adapter_config(new_tree, adapter_name)
    _check_configs(old_config, config, adapter_name)
    new = {path: node for path, node in adapted_leaves(new_tree) if node.tag.name == adapter_name}
    if extra := sorted(new.keys() - old.keys()):
        raise ValueError(
            f"The new adapter is on {extra}, where '{adapter_name}' is not. Load it with load_adapter, which compiles "
            "again, or start with an adapter on all of these modules."
        )

    def swapped(path: str, node: Adapted) -> Adapted:
        if node.tag.name != adapter_name:
            return node
        return _swapped(path, node, new[path]) if path in new else _emptied(path, node, config)

    result: T = map_adapted(swapped, model)
    return result


def _has_factors(node: Adapted) -> bool:
    return node.tag.role is None and isinstance(node.tag.config, LoraConfig)


def _padded(array: jax.Array, axis: int, length: int) -> jax.Array:
    """The array with zeros at the end of an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)


def _check_configs(old: Method, new: Method, adapter_name: str) -> None:
    """Raise ValueError unless both adapters run in one program, on one base."""
    if isinstance(old, XLoraConfig) and isinstance(new, XLoraConfig) and old.adapters != new.adapters:
        raise ValueError(
            f"X-LoRA '{adapter_name}' is of the LoRAs {old.adapters}, which stay as they are in a swap, "
            f"and the new one of {new.adapters}. Load the new one on the base."
        )
    if old.structure() != new.structure():
        before, after = old.to_dict(), new.to_dict()
        rates = [name for name in before if name.endswith("dropout")]
        unlike = {}
        for name in ("peft_type", *type(old).structural, *rates):
            if before.get(name) != after.get(name):
                unlike[name] = (before.get(name), after.get(name))
        raise ValueError(
            f"Adapter '{adapter_name}' and the new one do not run in one compiled program: they differ in {unlike}. "
            "Load the new one with load_adapter."
        )
    for config in (old, new):
        changes_base = False
        if isinstance(config, LoraConfig):
            changes_base = config.initializer.changes_base or chosen(config).changes_base
        if changes_base or config.layer_replication:
            raise ValueError(
                f"Adapter '{adapter_name}' or the new one changes the base itself (init_lora_weights="
                f"{getattr(config, 'init_lora_weights', None)!r}, layer_replication={config.layer_replication}, "
                f"kasa_config={getattr(config, 'kasa_config', None)}), "
                "which no swap undoes. Load the new one on the base."
            )


def _emptied(path: str, node: Adapted, config: Method) -> Adapted:
    """The leaf with an adapter of the new config that changes nothing."""
    if not _has_factors(node) or node.params.keys() - FACTORS.keys():
        raise ValueError(
            f"The new adapter leaves out '{path}', where '{node.tag.name}' is {node.tag.rule.label} and cannot be made "
            "nothing. Load it with load_adapter, which compiles again."
        )
    params, state = jax.tree.map(jnp.zeros_like, (node.params, node.state))
    tag = dataclasses.replace(node.tag, config=config, dtypes={})
    return dataclasses.replace(node, params=params, state=state, tag=tag)


def _swapped(path: str, node: Adapted, new: Adapted) -> Adapted:
    """The leaf with the arrays of the new adapter; one of an X-LoRA's LoRAs stays the same of its modules."""
    if NUMBER in node.state:
        new = dataclasses.replace(new, state={**new.state, NUMBER: node.state[NUMBER]})
    keys, new_keys = {*node.params, *node.state}, {*new.params, *new.state}
    if new.tag != node.tag or keys != new_keys:
        raise ValueError(
            f"Adapter '{node.tag.name}' has {sorted(keys)} at '{path}', and the new one {sorted(new_keys)}, which is "
            "another program. Switch dropout off, or load the new one with load_adapter."
        )
    params = {role: _fitted(path, role, new.params[role], old, node) for role, old in node.params.items()}
    state = {}
    for role, old in node.state.items():
        is_shared = isinstance(old, Mapping)  # arrays of the layer's matrix, which `map_adapted` hands over
        state[role] = old if is_shared else _fitted(path, role, new.state[role], old, node)
    return dataclasses.replace(node, params=params, state=state, tag=new.tag)


def _fitted(path: str, role: str, new: jax.Array, old: jax.Array, node: Adapted) -> jax.Array:
    """A new array in the shape, element type and place of the old one, with zeros where its rank is smaller."""
    axes = ("",) * len(node.layout.stack) + tuple(node.method.axes.get(role, ()))
    for axis, name in enumerate(axes[: new.ndim]):
        has_room = name == "rank" and node.layout.groups == 1
        if has_room and new.shape[axis] < old.shape[axis]:
            new = _padded(new, axis, old.shape[axis])
    if new.shape != old.shape:
        raise ValueError(
            f"The new adapter's {role} at '{path}' is of shape {new.shape}, and there is room for {old.shape}. Make "
            "room for the highest rank before compiling: pj.prepare_model_for_compiled_hotswap(model, target_rank=...)."
        )
    new = jnp.asarray(new, old.dtype)
    return new if new.sharding == old.sharding else jax.device_put(new, old.sharding)
