"""Adapters to and from PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Unpack

import numpy as np
from peft_jax.interop.adapter_files import read_tensors
from peft_jax.interop.conversion import without_start
from peft_jax.interop.files import save_tensors
from peft_jax.interop.formats import PEFT_VERSION, ROWS, WEIGHTS_FILE
from peft_jax.interop.keys import renamed
from peft_jax.interop.patterns import in_file_order, warn_of_sorted_patterns
from peft_jax.interop.tensors import adapter_config, get_peft_model_state_dict, set_peft_model_state_dict
from peft_jax.interop.xlora_experts import with_experts, with_lost_tensors

from peft_jax.adapters.attach import apply_adapter
from peft_jax.core.finite import non_finite
from peft_jax.core.handle import Handle
from peft_jax.core.hub import ADAPTER_FILES, HubOptions, find_folder
from peft_jax.core.leaves import Layouts
from peft_jax.core.precision import ComputeDtype, checked_compute_dtype, with_compute_dtype
from peft_jax.core.selecting import present
from peft_jax.core.short_errors import short_errors
from peft_jax.methods.base import CONFIG_FILE, Method, PeftConfig
from peft_jax.prompts.base import PromptMethod
from peft_jax.prompts.xlora import XLoraConfig

T = TypeVar("T")
WITHOUT_TASK = ("ADAPTION_PROMPT", "CPT", "SHADOW", "XLORA")  # which are within the layers; CPT sets its task itself


def save_adapter(
    params: object,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write an adapter as PEFT writes it, so that PyTorch PEFT computes the same from it.

    An adapter not named ``default`` goes into a folder of its name below ``directory``, as PEFT does it. Each file
    appears whole or not at all.

    Args:
        params: A tree or model handle with the adapter.
        directory: Folder to write to; made if need be.
        adapter_name: Which adapter.
        path_initial_model_for_weight_conversion: Folder of the same adapter as it was saved before training. A LoRA
            whose start took a part out of the base is then saved as one that goes on the base as it was, of twice
            the rank.
        save_embedding_layers: As in `get_peft_model_state_dict`.

    Raises:
        ValueError: if there is no such adapter, it cannot be converted, or it holds values that are not finite; nothing
            is written then.

    Example:
        >>> import tempfile, jax.numpy as jnp, peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 8))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(params, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    config = adapter_config(params.params if isinstance(params, Handle) else params, adapter_name)
    tensors = get_peft_model_state_dict(params, adapter_name, save_embedding_layers=save_embedding_layers)
    if path_initial_model_for_weight_conversion is not None:
        initial = read_tensors(pathlib.Path(path_initial_model_for_weight_conversion) / WEIGHTS_FILE)
        config, tensors = without_start(config, tensors, initial)
    if broken := non_finite(tensors):
        raise ValueError(
            f"adapter '{adapter_name}' is not saved: its tensor '{broken}' holds NaN or infinity. "
            "Save the adapter as it was before training diverged, or in a wider element type."
        )
    write_adapter(config, tensors, adapter_folder(directory, adapter_name))


def write_adapter(config: Method, tensors: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
    """Write the two files of an adapter into a folder, each of which appears whole or not at all."""
    fields = {**config.to_dict(), "inference_mode": True, "peft_version": config.peft_version or PEFT_VERSION}
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f".{WEIGHTS_FILE}.part", folder / f".{CONFIG_FILE}.part"
    try:
        save_tensors(tensors, weights)
        text.write_text(json.dumps(in_file_order(fields, config, tensors), indent=2))
        shutil.copymode(text, weights)  # safetensors lets the owner alone read what it writes
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(text, folder / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)


def adapter_folder(directory: str | os.PathLike[str], adapter_name: str) -> pathlib.Path:
    """The folder that an adapter is saved in below ``directory``.

    Example:
        >>> adapter_folder("run", "default").name, adapter_folder("run", "other").name
        ('run', 'other')
    """
    return pathlib.Path(directory) / ("" if adapter_name == "default" else adapter_name)


def load_adapter(
    params: T,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    config: PeftConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    compute_dtype: ComputeDtype | None = None,
    **hub: Unpack[HubOptions],
) -> T:
    """A new tree or handle with an adapter that PEFT, or `save_adapter`, wrote.

    The config decides which layers are adapted, as in PEFT; tensors that it does not ask for are an error, and so are
    those that are not there. Arrays become float32; the stored element types are remembered for saving.

    Args:
        params: The base: a tree or a model handle.
        directory: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or an id on the hub.
        adapter_name: Name to give the adapter.
        is_trainable: Whether it is to be trained on.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
        fn: As there. Give it where it was given when the adapter was attached.
        args: As there.
        config: The adapter's config, instead of the one in the folder.
        key_mapping: Replacements of parts of keys by regexes, before the file is read; the first that matches a key is
            applied. A key has no ``base_model.model.`` in front there, as in PEFT.
        ignore_mismatched_sizes: Whether tensors of other shapes than the base asks for are left out, with a warning;
            these arrays are initialized as those of a fresh adapter.
        compute_dtype: Element type of its own products, as in `peft_jax.apply_adapter`.
        **hub: Where on the hub, as `peft_jax.core.hub.HubOptions` says.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the file is damaged, its config is not supported, it does not fit this base, or it holds values
            that are not finite; nothing is loaded in part.
    """
    if compute_dtype is not None:
        checked_compute_dtype(compute_dtype)
    with short_errors():
        folder = find_folder(directory, ADAPTER_FILES, hub)
        if config is None:
            config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, Method) or config.peft_type not in ROWS:
            raise ValueError(f"Loading '{config.peft_type}' adapters is not supported. Supported: {sorted(ROWS)}.")
        _check_task(config, folder)
        config = config.replace(inference_mode=not is_trainable)
        tensors = renamed(read_tensors(folder / WEIGHTS_FILE), key_mapping or {})
        if isinstance(config, XLoraConfig) and isinstance(params, Handle):
            params, config = with_experts(params, config, directory, hub)
            tensors = with_lost_tensors(config, tensors, directory, hub)
        if ignore_mismatched_sizes:
            tensors = _fitting(params, config, tensors, {"layout": layout, "fn": fn, "args": args})
        loaded = set_peft_model_state_dict(
            params, config, tensors, adapter_name=adapter_name, layout=layout, fn=fn, args=args
        )
    warn_of_sorted_patterns(config, tensors)
    return loaded if compute_dtype is None else with_compute_dtype(loaded, compute_dtype, adapter_name)


def _check_task(config: Method, folder: pathlib.Path) -> None:
    """Refuse a prompt without a task: PEFT makes a model of it that computes nothing."""
    if config.task_type is None and isinstance(config, PromptMethod) and config.peft_type not in WITHOUT_TASK:
        raise ValueError(
            f"'{folder / CONFIG_FILE}' has no task_type, without which PEFT computes nothing from a "
            f"{config.peft_type}. Write the task that it was trained for, such as CAUSAL_LM."
        )


def _fitting(
    params: object, config: Method, tensors: dict[str, np.ndarray], options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of a file, those of other shapes than a fresh adapter's exchanged for these."""
    fresh = get_peft_model_state_dict(apply_adapter(params, config, **options), save_embedding_layers=False)
    unlike = [key for key, tensor in tensors.items() if key in fresh and fresh[key].shape != tensor.shape]
    if unlike:
        told = ", ".join(f"{key} {tensors[key].shape}, not {fresh[key].shape}" for key in unlike)
        warnings.warn(f"Tensors of other sizes are not loaded and start afresh: {told}.", stacklevel=3)
    return {**tensors, **present(fresh, unlike)}
