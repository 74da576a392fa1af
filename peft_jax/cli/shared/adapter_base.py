"""Reading an adapter and its base model, for the commands that use an adapter."""

from pathlib import Path
from typing import Any

import peft_jax as pj
from peft_jax.cli.shared.common_options import ModelOptions
from peft_jax.cli.shared.task import Task, refuse_random, task_of_adapter
from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.interop.describe import read_adapter_config
from peft_jax.prompts.tokenizer import read_tokenizer


def load_model(options: ModelOptions, task: Task) -> Any:
    """The base model, with the adapter if there is one.

    Raises:
        ValueError: If no base is named, the adapter does not fit it, or a part of it would be random.
        OSError: If a file or folder is missing.
    """
    name, _ = find_base(options.model, options.adapter)
    model = task.read_for(name, options.adapter, dtype=options.dtype, load_in_8bit=options.load_in_8bit)
    if options.adapter is not None:
        model = pj.PeftModel.from_pretrained(model, options.adapter)
    refuse_random(model)
    return model


def find_task(model: str | None, adapter: Path | None) -> Task:
    """The task of the adapter, or of the model alone.

    Raises:
        ValueError: If no base is named, or the commands are not for its task.
        FileNotFoundError: If it is not there.
    """
    return task_of_adapter(str(find_base(model, adapter)[1]), adapter)


def find_base(model: str | None, adapter: Path | None) -> tuple[str, Path]:
    """Name of the base model, and its folder.

    Raises:
        ValueError: If neither the words nor the adapter name one.
        FileNotFoundError: If it is not there.
    """
    if adapter is None:
        if model is None:
            raise ValueError("no model is given. Name one with --model, or an adapter with --adapter.")
        return model, find_checkpoint(model)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if model is not None:
        return model, find_checkpoint(model)
    if not named:
        raise ValueError(f"the adapter in {adapter} names no base model. Give it with --model.")
    try:
        return named, find_checkpoint(named)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of {adapter} is not there: {error} Or give it with --model."
        ) from error


def find_tokenizer(model: str | None, adapter: Path | None) -> Any:
    """The tokenizer in the adapter's folder if it has one, else the base's.

    Raises:
        ValueError: If there is none that can be read.
    """
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(adapter)
    return read_tokenizer(find_base(model, adapter)[1])
