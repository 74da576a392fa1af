"""The LoRA that is nearest to an adapter of any method that changes weights: PEFT's ``convert_to_lora``.

What the adapter changes of each matrix is decomposed, and its largest singular values are kept: no other matrix of that
rank is nearer. Numbers follow PEFT 0.21.2, ``tuners/lora/conversion.py``.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peft_jax.interop.adapter import save_adapter
from peft_jax.interop.tensors import adapter_config, get_peft_model_state_dict

from peft_jax.adapters.build import Contents, build
from peft_jax.adapters.plan import Target
from peft_jax.core.adapted import Adapted, changed_layers, merged_matrix, nested_adapters
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import find_leaves
from peft_jax.core.merge import unload
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import fields_of, without
from peft_jax.core.weight import Dense, as_leaf, as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.miss import MissConfig
from peft_jax.methods.roles import SAVED, Whole
from peft_jax.methods.trainable_tokens import Tokens

KEPT = (  # fields of the config that say the same of the LoRA
    "task_type",
    "base_model_name_or_path",
    "revision",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "fan_in_fan_out",
)


class Layer(NamedTuple):
    """The factors of one layer, ``(in, rank)`` and ``(rank, out)``, and how far their product is from the change."""

    a: jax.Array
    b: jax.Array
    error: float


class NearestLora(NamedTuple):
    """A tree or handle with the LoRA alone, named ``default``; its config; its relative error by module."""

    params: PyTree
    config: LoraConfig
    errors: dict[str, float]


def convert_to_lora(model: Any, rank: float, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The config and the tensors, under PEFT's keys, of the LoRA nearest to an adapter.

    Any method that changes matrices is converted, those too that PEFT refuses, as OFT: what counts is the difference
    between the adapted matrix and the base's. The LoRA has scale 1. Modules and tokens that are trained whole go with
    it. `lora_conversion_errors` says how near it is.

    Args:
        model: A tree or model handle with the adapter.
        rank: The LoRA's rank. A float is a threshold instead: each module gets the smallest rank whose singular values
            have at least that part of the sum of all squares. MiSS is a LoRA of its own rank, which it keeps.
        adapter_name: Which adapter.

    Raises:
        TypeError: if the adapter is no change of matrices alone.
        ValueError: if there is no such adapter, the rank is none for its matrices, or biases are trained.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoHaConfig(r=2, init_weights=False, target_modules=["q"])
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.ones((6, 8))}}, config)
        >>> config, tensors = convert_to_lora(params, 4)
        >>> config.r, {key: tensor.shape for key, tensor in tensors.items()}
        (4, {'base_model.model.q.lora_A.weight': (4, 6), 'base_model.model.q.lora_B.weight': (8, 4)})
    """
    made = nearest_lora(model, rank, adapter_name)
    return made.config, get_peft_model_state_dict(made.params, save_embedding_layers=False)


def lora_conversion_errors(model: Any, rank: float, adapter_name: str = "default") -> dict[str, float]:
    """How far a LoRA of some rank is from an adapter: by module the norm of the difference over that of the change.

    Args:
        model: As in `convert_to_lora`.
        rank: As there.
        adapter_name: As there.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoHaConfig(r=2, init_weights=False, target_modules=["q"])
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.ones((6, 8))}}, config)
        >>> errors = [lora_conversion_errors(params, rank)["q"] for rank in (1, 2, 4)]
        >>> errors[0] > errors[1] > errors[2], errors[2] < 1e-5
        (True, True)
    """
    return nearest_lora(model, rank, adapter_name).errors


def save_as_lora(
    path: str | os.PathLike[str], model: Any, rank: float, adapter_name: str = "default"
) -> dict[str, float]:
    """Write the LoRA nearest to an adapter as PEFT's files, and return its errors as `lora_conversion_errors` does.

    Args:
        path: Folder to write to; made if need be.
        model: As in `convert_to_lora`.
        rank: As there.
        adapter_name: As there.

    Example:
        >>> import tempfile, peft_jax as pj
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.ones((4, 4))}}, pj.OFTConfig(target_modules=["q"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     errors = save_as_lora(folder, params, 0.9)
        ...     sorted(os.listdir(folder)), errors
        (['adapter_config.json', 'adapter_model.safetensors'], {'q': 0.0})
    """
    made = nearest_lora(model, rank, adapter_name)
    save_adapter(made.params, path, save_embedding_layers=False)
    return made.errors


def nearest_lora(model: Any, rank: float, adapter_name: str) -> NearestLora:
    """The LoRA nearest to an adapter, in place of all adapters of the tree.

    Args:
        model: As in `convert_to_lora`.
        rank: As there.
        adapter_name: As there.
    """
    tree = model.params if isinstance(model, Handle) else model
    config = adapter_config(tree, adapter_name)
    _check_rank(rank)
    _check_config(config, adapter_name)
    targets: list[Target] = []
    layers: dict[int, dict[tuple[int, ...], Layer]] = {}
    copies: dict[int, Adapted] = {}
    for position, leaf in enumerate(find_leaves(tree, None)):
        node = nested_adapters(leaf.value).get(adapter_name)
        if node is None:
            continue
        is_copy = node.tag.role == Whole(SAVED) or isinstance(node.tag.role, Tokens)
        if node.tag.role is not None and not is_copy:
            raise TypeError(
                f"Adapter '{adapter_name}' ({config.peft_type}) changes '{leaf.path}', a bias or a vector, which the "
                "LoRA of a matrix does not. Keep the adapter as it is, or merge it: pj.merge(params)."
            )
        base = as_leaf(as_weight(node.base, node.layout).unadapted)
        targets.append(Target(position, leaf._replace(value=base), changed_layers(node), node.tag.role))
        if is_copy:
            copies[position] = node
        else:
            layers[position] = _layers(node, targets[-1], rank)
    if not layers:
        raise TypeError(f"Adapter '{adapter_name}' ({config.peft_type}) changes no matrix that a LoRA could be of.")

    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for target in targets:
        for index, layer in layers.get(target.position, {}).items():
            name = str(target.leaf.names[index])
            ranks[name], errors[name] = layer.b.shape[0], layer.error
    lora = _lora_config(config, rank, ranks)

    def contents_of(target: Target) -> Contents:
        base = as_weight(target.leaf.value, target.leaf.layout)
        if target.position in copies:
            node = copies[target.position]
            return Contents(node.params, node.state, base, node.tag.dtypes)
        params = _stacked(layers[target.position], target)
        return Contents(params, lora.state(target.leaf.names, target.adapted), base)

    new = build(unload(tree), "default", lora, targets, contents_of)
    return NearestLora(model.replace(new) if isinstance(model, Handle) else new, lora, errors)


def _check_rank(rank: float) -> None:
    """Raise ValueError unless it is a rank, or a threshold."""
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"A rank that is a float is a threshold in (0, 1], got {rank}. Write a whole number for a rank."
        )
    if not isinstance(rank, float) and rank < 1:
        raise ValueError(f"A LoRA has a rank of at least 1, got {rank}.")


def _check_config(config: Method, adapter_name: str) -> None:
    """Raise TypeError or ValueError unless matrices are all that an adapter changes, and of the base that it is on."""
    if config.on_model:
        raise TypeError(
            f"Adapter '{adapter_name}' is {config.peft_type}, which changes no weights, so that no LoRA is near it."
        )
    has_bias = config.bias if config.bias != "none" else getattr(config, "lora_bias", False)
    if has_bias:
        raise ValueError(f"Adapter '{adapter_name}' trains biases ({has_bias!r}), which a plain LoRA does not hold.")
    if config.target_parameters:
        raise ValueError(f"Adapter '{adapter_name}' has target_parameters, and LoRAs are made of modules alone.")
    if isinstance(config, LoraConfig) and config.kasa_config is not None:
        raise ValueError(
            f"Adapter '{adapter_name}' has kasa_config, and is on a base without some singular values, which a plain "
            "LoRA is not. Merge it: model.merge_and_unload()."
        )
    if isinstance(config, LoraConfig) and config.initializer.changes_base:
        raise ValueError(
            f"Adapter '{adapter_name}' started at a part of the base (init_lora_weights={config.init_lora_weights!r}), "
            "and is a LoRA already. Save it with path_initial_model_for_weight_conversion."
        )


def _layers(node: Adapted, target: Target, rank: float) -> dict[tuple[int, ...], Layer]:
    """The factors of each adapted layer of a leaf."""
    state = without(node.state, ["dropout"])
    weight = as_weight(target.leaf.value, node.layout)
    alone = Dense(weight.dense().astype(jnp.float32), node.layout)
    changes = merged_matrix(node.method, node.params, state, alone) - node.layout.matrix(alone.array)
    found = {}
    for index in np.ndindex(target.adapted.shape):
        if not target.adapted[index]:
            continue
        change, name = changes[index], str(target.leaf.names[index])
        if isinstance(node.method, MissConfig) and node.method.is_low_rank:
            own = jax.tree.map(lambda array, index=index: array[index], (node.params, state))
            a, b = node.method.factors(*own, *change.shape)
        else:
            a, b = _nearest(change, rank, name)
        norm = jnp.linalg.norm(change)
        error = jnp.where(norm > 0, jnp.linalg.norm(change - a @ b) / norm, 0)
        found[index] = Layer(a, b, float(error))
    return found


def _nearest(change: jax.Array, rank: float, name: str) -> tuple[jax.Array, jax.Array]:
    """The factors nearest to a change ``(in, out)``, of a rank or by a threshold."""
    u, s, vt = jnp.linalg.svd(change, full_matrices=False)
    kept = rank
    if isinstance(rank, float):
        energy = np.cumsum(np.asarray(s) ** 2)
        kept = int(np.searchsorted(energy, np.float32(rank) * energy[-1])) + 1
    kept = int(kept)
    if kept > len(s):
        raise ValueError(f"rank={kept} is above {len(s)}, the largest of '{name}' of shape {change.shape}.")
    return u[:, :kept], s[:kept, None] * vt[:kept]


def _stacked(layers: Mapping[tuple[int, ...], Layer], target: Target) -> dict[str, jax.Array]:
    """The factors of a leaf, with zeros for smaller ranks and for layers without an adapter."""
    n_in, n_out = target.leaf.layout.sizes(target.leaf.value.shape)
    largest = max(layer.b.shape[0] for layer in layers.values())
    a = np.zeros((*target.adapted.shape, n_in, largest), np.float32)
    b = np.zeros((*target.adapted.shape, largest, n_out), np.float32)
    for index, layer in layers.items():
        own = layer.b.shape[0]
        a[index][:, :own], b[index][:own] = layer.a, layer.b
    return {"lora_A": jnp.asarray(a), "lora_B": jnp.asarray(b)}


def _lora_config(config: Method, rank: float, ranks: Mapping[str, int]) -> LoraConfig:
    """The LoRA's config: the adapter's targets, with the modules by name whose rank is another, as PEFT has them.

    A pattern names modules by their ends, so that one whose name is the end of another's has its start marked.
    """
    r = 1 if isinstance(rank, float) else rank
    by_pattern = isinstance(config.target_modules, str)
    pattern: dict[str, int] = {}
    named: set[str] = set() if by_pattern else set(config.target_modules or ())
    for name, found in ranks.items():
        if found == rank and not by_pattern:
            named.add(name)
            continue
        is_end = any(other.endswith(f".{name}") for other in ranks)
        pattern[f"^{name}" if is_end else name] = found
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=config.target_modules if by_pattern else sorted(named),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        inference_mode=config.inference_mode,
        **fields_of(config, KEPT),
    )
