"""The LoRAs of an X-LoRA from their folders, and what PEFT leaves out of an X-LoRA's own file."""

import os
import pathlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from peft_jax.interop.adapter_files import read_tensors
from peft_jax.interop.formats import WEIGHTS_FILE, tensor_key
from peft_jax.interop.tensors import set_peft_model_state_dict

from peft_jax.adapters.complete import completed
from peft_jax.core.handle import Handle
from peft_jax.core.hub import ADAPTER_FILES, HubOptions, find_folder
from peft_jax.core.merge import active_adapters, disable_adapter, set_adapter
from peft_jax.methods.base import PeftConfig
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.variants import variant_of
from peft_jax.prompts.xlora import XLoraConfig, with_numbers

H = TypeVar("H", bound=Handle)
Tensors = dict[str, np.ndarray]
WRAPPED = "base_model.lora_model."  # before a module's path where PEFT saves a LoRA of an X-LoRA
AS_BEFORE = "For the LoRAs as they were before give config= with use_trainable_adapters=False."
PLAIN = (  # fields of a LoRA that X-LoRA does not scale, or that PEFT does not read
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
)


def with_experts(
    handle: H, config: XLoraConfig, saved: str | os.PathLike[str] | None = None, hub: HubOptions | None = None
) -> tuple[H, XLoraConfig]:
    """The model with the LoRAs of an X-LoRA, and the config with the model's sizes.

    They are frozen, and active in the model's two passes alone; those that are trained are active as other adapters.

    Args:
        handle: The model.
        config: The X-LoRA's config.
        saved: The folder or hub id that the X-LoRA is read from, which has LoRAs that were trained with it.
        hub: Where on the hub that is.

    Raises:
        FileNotFoundError: if a LoRA is not there.
        ValueError: if the config does not fit the model, or a LoRA is no plain one.
    """
    config, before = completed(config, handle), active_adapters(handle.params)
    elsewhere: HubOptions = {**(hub or {})}  # the LoRAs are in places of their own
    elsewhere.pop("subfolder", None)
    elsewhere.pop("revision", None)
    trained = config.use_trainable_adapters and not config.inference_mode
    for name, path in (config.adapters or {}).items():
        if config.use_trainable_adapters and saved is not None:
            folder = _trained(saved, name, hub)
        else:
            folder = find_folder(path, ADAPTER_FILES, elsewhere)
        lora = _checked(PeftConfig.from_pretrained(folder), name, folder).replace(inference_mode=not trained)
        tensors = read_tensors(folder / WEIGHTS_FILE)
        if any(key.startswith(WRAPPED) for key in tensors):
            raise ValueError(
                f"'{folder}' is what PEFT saves of a LoRA beside an X-LoRA: it lacks the layers whose numbers are names"
                f" of other LoRAs. {AS_BEFORE}"
            )
        handle = set_peft_model_state_dict(handle, lora, tensors, adapter_name=name)
    active = [*before, *(config.experts if trained else ())]
    params = set_adapter(handle.params, active) if active else disable_adapter(handle.params)
    return with_numbers(handle.replace(params), config)


def _checked(config: PeftConfig, name: str, folder: pathlib.Path) -> LoraConfig:
    """The config of a LoRA.

    Raises:
        ValueError: if it is none, or it is no plain one.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"X-LoRA scales LoRAs, and '{folder}' is {config.peft_type}. Name another in adapters['{name}']."
        )
    fields = [field for field in PLAIN if getattr(config, field)]
    fields += [variant_of(config) or ""]
    fields += ["bias"] if config.bias != "none" else []
    fields += ["init_lora_weights"] if config.initializer.changes_base else []
    if found := [field for field in fields if field]:
        raise ValueError(
            f"X-LoRA scales plain LoRAs, and '{folder}' has {found[0]}={getattr(config, found[0])!r}. Name another in "
            f"adapters['{name}']."
        )
    return config


def _trained(saved: str | os.PathLike[str], name: str, hub: HubOptions | None) -> pathlib.Path:
    """The folder of a LoRA that was trained with the X-LoRA."""
    try:
        return _part(saved, name, hub)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"'{saved}' has no folder '{name}' with the LoRA that was trained with this X-LoRA "
            f"(use_trainable_adapters=True). Save it without selected_adapters. {AS_BEFORE}"
        ) from None


def _part(saved: str | os.PathLike[str], name: str, hub: HubOptions | None) -> pathlib.Path:
    """The folder that an adapter of a number is saved in, beside the X-LoRA."""
    options: HubOptions = {**(hub or {})}
    inside = options.get("subfolder")
    options["subfolder"] = f"{inside}/{name}" if inside else name
    return find_folder(saved, ADAPTER_FILES, options)


def with_lost_tensors(
    config: XLoraConfig, tensors: Tensors, saved: str | os.PathLike[str], hub: HubOptions | None = None
) -> Tensors:
    """The tensors of an X-LoRA's file, with those of the classifier that PEFT takes for a LoRA's of that number.

    PEFT leaves ``layers.0`` out where a LoRA is named "0", and writes it as ``layers`` into that one's file.

    Args:
        config: The X-LoRA's config.
        tensors: Those of the file.
        saved: Its folder or hub id.
        hub: Where on the hub that is.

    Raises:
        ValueError: if they are not there either.
    """
    whole = dict(tensors)
    for layer, _, _ in config.layers:
        number = layer.rpartition(".")[2]
        keys = {part: tensor_key("XLORA", "", f"{layer}.{part}") for part in ("weight", "bias")}
        if number not in config.experts or whole.keys() & set(keys.values()):
            continue
        lost = _lost(saved, number, hub)
        if not lost.keys() >= keys.keys():
            raise ValueError(
                f"'{saved}' has no {keys['weight']}: PEFT takes it for a tensor of the LoRA '{number}', and saves it "
                "with that one alone. Save all adapters, without selected_adapters."
            )
        whole |= {key: lost[part] for part, key in keys.items()}
    return whole


def _lost(saved: str | os.PathLike[str], number: str, hub: HubOptions | None) -> Mapping[str, np.ndarray]:
    """The weight and the bias of a layer of the classifier in the file of a LoRA, as far as they are there."""
    try:
        tensors = read_tensors(_part(saved, number, hub) / WEIGHTS_FILE)
    except FileNotFoundError:
        return {}
    found = {}
    for part in ("weight", "bias"):
        key = tensor_key("XLORA", "", f"layers.{part}")
        if key in tensors:
            found[part] = tensors[key]
    return found
