"""Put a fresh prompt on a model handle."""

from typing import Any, TypeVar

import jax

from peft_jax.adapters.build import build, initial_contents
from peft_jax.adapters.complete import completed, untied_for
from peft_jax.adapters.plan import Target, plan
from peft_jax.core.adapted_tree import check_adapter_name
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf, find_leaves, is_matrix, module_names
from peft_jax.core.targets import check_saved, is_saved_module
from peft_jax.core.weight import Weight
from peft_jax.prompts.base import PromptMethod

H = TypeVar("H", bound=Handle)


def attach_prompt(handle: H, config: PromptMethod, *, key: jax.Array | None = None, adapter_name: str = "default") -> H:
    """A new handle with a fresh prompt; `peft_jax.get_peft_model` calls it.

    Args:
        handle: A model, with or without adapters.
        config: What the prompt is, and how it starts.
        key: A JAX random key; None means ``jax.random.key(0)``.
        adapter_name: Name of the adapter, new to the model.

    Raises:
        ValueError: if the config does not fit the model, or the name is taken.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = attach_prompt(model, pj.PromptTuningConfig(num_virtual_tokens=4))
        >>> len(model.params["model"]["embed_tokens"]["embedding"].params["prompt"])
        4
    """
    check_adapter_name(adapter_name, handle)
    config = completed(config, handle)
    handle = untied_for(
        handle, config, lambda name: is_saved_module(config, name), keeps_ties=config.ensure_weight_tying
    )
    found = find_leaves(handle.params, handle.layouts())
    check_saved(config, sorted(set(module_names(found))))
    base_key = jax.random.key(0) if key is None else key
    targets = plan(found, config, prompt_places(config, found, handle))

    def initialize(target: Target, base: Weight) -> Any:
        return *config.init_prompt(base, target.leaf.names, target.adapted, base_key), base

    contents_of = initial_contents(config, targets, initialize)
    trainable = not config.inference_mode
    return handle.replace(build(handle.params, adapter_name, config, targets, contents_of, trainable=trainable))


def prompt_places(config: PromptMethod, found: list[Leaf], handle: Handle) -> set[str]:
    """The modules whose matrices carry a prompt's arrays.

    Raises:
        ValueError: if there are none, or one of them is trained whole.
    """
    modules = module_names(filter(is_matrix, found))
    places = config.places(modules, handle)
    if both := [name for name in places if is_saved_module(config, name)]:
        raise ValueError(f"modules_to_save names '{both[0]}', where the prompt's arrays lie. Remove it.")
    return set(places)
