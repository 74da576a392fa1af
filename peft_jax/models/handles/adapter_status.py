"""Which adapters a tree has, layer by layer and as a whole, as data: PEFT's ``get_layer_status`` and its model's."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax

from peft_jax.core.adapted import ADAPTER, Adapted, changed_layers, nested_adapters
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import find_leaves
from peft_jax.core.merge import active_adapters
from peft_jax.core.partition import count_parameters
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import as_weight
from peft_jax.methods.roles import REPLACED, SAVED, Whole
from peft_jax.methods.trainable_tokens import Tokens
from peft_jax.models.handles.base import ModelHandle

Mixed = Literal["irregular"]  # PEFT's word where layers differ


@dataclasses.dataclass(frozen=True)
class TunerLayerStatus:
    """The adapters of one layer; fields and their meaning are PEFT's.

    Attributes:
        name: Path of the module; in a handle with PEFT's ``model.`` in front.
        module_type: The method in small letters and ``Linear`` or ``Embedding``, or PEFT's class of what is trained
            whole.
        enabled: Whether an adapter of the tree is active.
        active_adapters: Names of the tree's active adapters, in the order in which they are applied.
        merged_adapters: Always empty: `peft_jax.merge` gives another tree, without adapters.
        requires_grad: Whether each adapter here is trained: it is active, and not frozen.
        available_adapters: Names of the adapters here, sorted.
        devices: The platforms that each adapter's arrays are on, in JAX's words.
        quantization_backend: The kind of the base's codes, as `peft_jax.quantize` takes it; None for a dense base.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclasses.dataclass(frozen=True)
class TunerModelStatus:
    """The adapters of a tree; fields and their meaning are PEFT's.

    Attributes:
        base_model_type: The class in transformers; ``"other"`` for a bare tree.
        adapter_model_type: PEFT's class for the first adapter's method.
        peft_types: The method of each adapter.
        trainable_params: The number of trained elements.
        total_params: The number of all elements.
        num_adapter_layers: The number of layers with an adapter.
        enabled: Whether an adapter is active.
        active_adapters: As in `TunerLayerStatus`.
        merged_adapters: As there.
        requires_grad: As there, ``"irregular"`` where layers differ.
        available_adapters: Names of all adapters on layers, sorted.
        devices: As there, of all layers.
        quantization_backend: As there, ``"irregular"`` where layers differ.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(params: PyTree) -> list[TunerLayerStatus]:
    """The status of every layer that has an adapter.

    Args:
        params: A tree or model handle with adapters.

    Raises:
        ValueError: if there is none on a layer; prompts are on no layer.

    Example:
        >>> import peft_jax as pj, jax.numpy as jnp
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
        >>> [status] = get_layer_status(params)
        >>> status.name, status.module_type, status.requires_grad
        ('q', 'lora.Linear', {'default': True})
    """
    tree, prefix = (params.params, "model.") if isinstance(params, Handle) else (params, "")
    layers: dict[tuple[str, str], list[Adapted]] = {}
    for leaf in find_leaves(tree, None):
        for node in list(nested_adapters(leaf.value).values())[::-1]:
            kind = _kind(node)
            if kind is None:
                continue
            changed = changed_layers(node)
            for name in leaf.names[changed].flat if changed.ndim else [leaf.names.item()]:
                inside = ".token_adapter" if isinstance(node.tag.role, Tokens) else ""
                layers.setdefault((f"{prefix}{name}{inside}", kind), []).append(node)
    if not layers:
        raise ValueError(
            f"No layer of this tree has an adapter (its adapters: {sorted(adapters(tree)) or 'none'}; prompts are on "
            "no layer). Attach one with pj.get_peft_model or pj.apply_adapter."
        )
    active = active_adapters(tree)
    return [_layer(name, kind, nodes, active) for (name, kind), nodes in layers.items()]


def get_model_status(params: PyTree) -> TunerModelStatus:
    """The status of a tree's adapters as a whole.

    Args:
        params: A tree or model handle with adapters.

    Raises:
        ValueError: as `get_layer_status`.

    Example:
        >>> import peft_jax as pj, jax.numpy as jnp
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> status = get_model_status(params)
        >>> status.trainable_params, status.num_adapter_layers, status.peft_types
        (16, 1, {'default': 'LORA'})
    """
    layers = get_layer_status(params)
    configs = adapters(params)
    tree = params.params if isinstance(params, Handle) else params
    trained, total = count_parameters(tree)
    first = next(iter(configs.values()))
    every_device, trained_or_not = dict[str, set[str]](), dict[str, set[Any]]()
    for layer in layers:
        for name in layer.available_adapters:
            every_device.setdefault(name, set()).update(layer.devices[name])
            trained_or_not.setdefault(name, set()).add(layer.requires_grad[name])
    names, devices, requires_grad = sorted(every_device), {}, {}
    for name in names:
        devices[name] = sorted(every_device[name])
        requires_grad[name] = _one(trained_or_not[name])
    return TunerModelStatus(
        base_model_type=params.config.architecture if isinstance(params, ModelHandle) else "other",
        adapter_model_type=type(first).__name__.removesuffix("Config") + "Model",
        peft_types={name: config.peft_type for name, config in configs.items()},
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=layers[0].enabled,
        active_adapters=layers[0].active_adapters,
        merged_adapters=[],
        requires_grad=requires_grad,
        available_adapters=names,
        devices=devices,
        quantization_backend=_one(layer.quantization_backend for layer in layers),
    )


def _kind(node: Adapted) -> str | None:
    """PEFT's type of the layer that an adapter makes of a leaf; None for one that belongs to its matrix's layer."""
    role, method = node.tag.role, node.tag.config
    if role is None:
        return (
            None if method.on_model else f"{method.peft_type.lower()}.{'Embedding' if node.layout.lookup else 'Linear'}"
        )
    if isinstance(role, Tokens):
        return "TrainableTokensLayer"
    if isinstance(role, Whole) and role.name in (SAVED, REPLACED):
        return "ModulesToSaveWrapper" if role.name == SAVED else "ln_tuning.LNTuningLayer"
    return None


def _layer(name: str, kind: str, nodes: list[Adapted], active: list[str]) -> TunerLayerStatus:
    """The status of one layer, from its adapters' leaves."""
    devices: dict[str, list[str]] = {}
    requires_grad: dict[str, Any] = {}
    for node in nodes:
        platforms = set[str]()
        for array in jax.tree.leaves((node.params, node.state.get(ADAPTER, {}))):
            platforms.update(device.platform for device in array.devices())
        devices[node.tag.name] = sorted(platforms)
        requires_grad[node.tag.name] = node.active and node.trainable
    base = as_weight(nodes[0].base, nodes[0].layout).unadapted
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=bool(active),
        active_adapters=list(active),
        merged_adapters=[],
        requires_grad=requires_grad,
        available_adapters=sorted(devices),
        devices=devices,
        quantization_backend=getattr(base, "kind", None),
    )


def _one(values: Iterable[Any]) -> Any:
    """The value that all have, or PEFT's word for several."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
