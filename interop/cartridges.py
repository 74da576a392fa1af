"""Several cartridges as one: their keys and values one after the other."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peft_jax.interop.adapter import write_adapter
from peft_jax.interop.adapter_files import read_tensors
from peft_jax.interop.describe import PROMPT_KEY
from peft_jax.interop.formats import WEIGHTS_FILE

from peft_jax.methods.base import Method, PeftConfig
from peft_jax.prompts.cartridge import CartridgeConfig

SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write one CARTRIDGE with the virtual tokens of several, one adapter's after the other's.

    As many of the first ones stay frozen as the first adapter has.

    Args:
        adapter_paths: Folders of at least two adapters that are of one model.
        output_path: Folder to write to; made if need be.
        safe_serialization: Must be True: pickles are not written.

    Raises:
        FileNotFoundError: if a folder has no adapter.
        ValueError: if there is one alone, or they are not of one model.

    Example:
        >>> import tempfile, peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, CartridgeConfig(num_virtual_tokens=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     compose_cartridge_adapters([folder, folder], output_path=f"{folder}/both")
        ...     PeftConfig.from_pretrained(f"{folder}/both").num_virtual_tokens
        4
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False asks for a pickle, which is not written. Leave it out.")
    if len(adapter_paths) < 2:
        raise ValueError(f"adapter_paths names at least two adapters, got {len(adapter_paths)}.")
    configs = [_config(path) for path in adapter_paths]
    first = configs[0]
    for path, config in zip(adapter_paths, configs, strict=True):
        for field in SAME:
            own, wanted = getattr(config, field), getattr(first, field)
            if own != wanted:
                raise ValueError(
                    f"'{path}' has {field}={own}, and '{adapter_paths[0]}' has {wanted}. Compose those of one model."
                )
    parts = [read_tensors(Path(path) / WEIGHTS_FILE)[PROMPT_KEY] for path in adapter_paths]
    whole = np.concatenate(parts)
    write_adapter(first.replace(num_virtual_tokens=len(whole)), {PROMPT_KEY: whole}, Path(output_path))


def _config(path: str | os.PathLike[str]) -> Method:
    """The config in a folder.

    Raises:
        ValueError: if it is of another method.
    """
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, CartridgeConfig):
        raise ValueError(f"'{path}' holds {config.peft_type}, and CARTRIDGE alone is composed.")
    return config
