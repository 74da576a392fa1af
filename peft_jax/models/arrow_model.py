"""A model whose tokens choose among several LoRAs: PEFT's ``create_arrow_model``."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.adapters.build import Contents, build
from peft_jax.adapters.plan import Target
from peft_jax.core.adapted import Adapted, changed_layers, nested_adapters
from peft_jax.core.leaves import find_leaves
from peft_jax.core.merge import set_adapter
from peft_jax.core.weight import as_weight
from peft_jax.methods.lora.alora import TOKENS
from peft_jax.methods.lora.arrow import ArrowConfig, ArrowRouter, routed
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.variants import variant_of
from peft_jax.models.handles.base import ModelHandle
from peft_jax.models.handles.peft_model import PeftModel

ROUTER = "arrow_router"
FACTORS = {"lora_A", "lora_B"}


def create_arrow_model(
    base_model: ModelHandle,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """The model with several LoRAs, among which each token chooses in every layer.

    The LoRAs are its adapters ``task_0`` and so on, and ``gks_0`` and so on; ``arrow_router`` is active. With general
    LoRAs the router has what is left of the others, which stay as they are by themselves; PEFT changes them. LoRAs that
    are loaded afterwards are not routed: make the model anew.

    Args:
        base_model: A model without adapters.
        task_specific_adapter_paths: Folders or hub ids of the LoRAs, of one rank and on the same modules. In
            ``user/name/folder`` the adapter is in a folder of the repository.
        arrow_config: How it routes.
        general_adapter_paths: Those whose mean is taken out of the others, with ``use_gks``.
        **adapter_kwargs: As `PeftModel.from_pretrained` takes them.

    Raises:
        FileNotFoundError: if an adapter is not there.
        ValueError: if there is none, they are not alike, or not plain LoRAs of products.

    Example:
        >>> import tempfile, peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> lora = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora.save_pretrained(folder)
        ...     model = create_arrow_model(base, [folder, folder], ArrowConfig(top_k=1))
        >>> model.active_adapters, sorted(model.peft_config)
        (['arrow_router'], ['arrow_router', 'task_0', 'task_1'])
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths names at least one LoRA, got none.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True takes the mean of general LoRAs out. Give general_adapter_paths=.")
    if general_adapter_paths and not arrow_config.use_gks:
        raise ValueError("general_adapter_paths are for use_gks=True. Set it, or leave the paths out.")
    if "compute_dtype" in adapter_kwargs:
        raise ValueError("An Arrow model has no compute_dtype: its router computes in float32. Leave it out.")
    if arrow_config.top_k > len(task_specific_adapter_paths):
        raise ValueError(f"top_k={arrow_config.top_k} is above the {len(task_specific_adapter_paths)} LoRAs there are.")
    tasks = {f"task_{number}": path for number, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{number}": path for number, path in enumerate(general_adapter_paths or ())}
    model: Any = base_model
    for name, path in {**tasks, **general}.items():
        folder, inside = _in_repository(path)
        options = {**({"subfolder": inside} if inside else {}), **adapter_kwargs}
        if isinstance(model, PeftModel):
            model = model.load_adapter(folder, name, **options)
        else:
            model = PeftModel.from_pretrained(model, folder, name, **options)
    found = [name for name in model.peft_config if name in {*tasks, *general}]
    return set_adapter(_with_router(model, list(tasks), [n for n in found if n in general], arrow_config), ROUTER)


def _in_repository(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Folder or hub id, and the folder in that repository: of ``user/name/some/folder`` the last two."""
    name = str(path)
    is_local = os.path.isdir(path) or os.path.isabs(name) or name.startswith(".")
    if is_local or name.count("/") < 2:
        return name, ""
    owner, repository, inside = name.strip("/").split("/", 2)
    return f"{owner}/{repository}", inside


def _with_router(model: Any, tasks: Sequence[str], general: Sequence[str], config: ArrowConfig) -> Any:
    """The model with a router over each leaf that has these adapters."""
    configs = {name: model.peft_config[name] for name in (*tasks, *general)}
    for name, one in configs.items():
        if not isinstance(one, LoraConfig):
            raise ValueError(f"'{name}' is {one.peft_type}, and Arrow routes LoRAs alone. Take another adapter.")
    router = ArrowRouter(arrow_config=config, task_type=configs[tasks[0]].task_type, inference_mode=True)

    targets, states = [], {}
    for position, leaf in enumerate(find_leaves(model.params, None)):
        nested = nested_adapters(leaf.value)
        own = {name: node for name, node in nested.items() if name in configs and node.tag.role is None}
        if not own:
            continue
        _check_alike(leaf.path, own, configs)
        first = own[tasks[0]]
        scaling = np.stack([np.asarray(own[name].state["scaling"]) for name in tasks])
        removed = _stacked(own, general) if general else None
        states[position] = routed(_stacked(own, tasks), removed, scaling, changed_layers(first), config.rng_seed)
        targets.append(Target(position, leaf, changed_layers(first), None))

    def contents_of(target: Target) -> Contents:
        return Contents({}, states[target.position], as_weight(target.leaf.value, target.leaf.layout))

    return model.replace(build(model.params, ROUTER, router, targets, contents_of, trainable=False))


def _check_alike(path: str, own: Mapping[str, Adapted], configs: Mapping[str, Any]) -> None:
    """Raise ValueError unless a leaf has all adapters, and they are plain LoRAs of one shape on the same layers."""
    rule = "Arrow takes LoRAs of one rank, on the same modules."
    if missing := sorted(configs.keys() - own.keys()):
        raise ValueError(f"'{path}' has {sorted(own)} and not {missing}. {rule}")
    first = next(iter(own.values()))
    for name, leaf in own.items():
        is_plain = leaf.params.keys() == FACTORS and variant_of(configs[name]) is None
        if not is_plain or TOKENS in leaf.state or leaf.layout.lookup:
            raise ValueError(f"'{name}' on '{path}' is no plain LoRA of a product (a variant, a bias, an embedding).")
        if jax.tree.map(np.shape, leaf.params) != jax.tree.map(np.shape, first.params):
            raise ValueError(f"'{name}' on '{path}' has another rank than '{first.tag.name}'. {rule}")
        if not np.array_equal(changed_layers(leaf), changed_layers(first)):
            raise ValueError(f"'{name}' and '{first.tag.name}' are on other layers of '{path}'. {rule}")


def _stacked(own: Mapping[str, Adapted], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The factors of several adapters, with an axis of these in front."""
    stacked = {}
    for role in sorted(FACTORS):
        stacked[role] = np.stack([np.asarray(own[name].params[role]) for name in names])
    return stacked
