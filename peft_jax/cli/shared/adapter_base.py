"""Reading an adapter and its base model, for the commands that use an adapter."""

from pathlib import Path
from typing import Any, NamedTuple

import peft_jax as pj
from peft_jax.cli.shared.common_options import ModelOptions
from peft_jax.cli.shared.end_token import with_generation_config
from peft_jax.cli.shared.task import Task, refuse_random, task_of_adapter
from peft_jax.interop.base_file import read_base_file
from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.interop.describe import read_adapter_config
from peft_jax.models.gguf_checkpoint import base_files
from peft_jax.models.weights_io import read_generation_config
from peft_jax.prompts.tokenizer import read_tokenizer


class Base(NamedTuple):
    """A base model: its name, its folder, and the GGUF file in that if it is read from one."""

    name: str
    folder: Path
    gguf_file: str | None


def load_model(options: ModelOptions, task: Task) -> Any:
    """The base model, with the adapter and its generation settings if there is one.

    Raises:
        ValueError: If no base is named, the adapter does not fit it, or a part of it would be random.
        OSError: If a file or folder is missing.
    """
    if options.adapter is None and options.compute_dtype is not None:
        raise ValueError(
            f"--compute-dtype {options.compute_dtype} is for an adapter's products. Give --adapter, or leave it out."
        )
    base = find_base(options.model, options.adapter, options.gguf_file)
    model = task.read_for(
        base.name,
        options.adapter,
        dtype=options.dtype,
        load_in_8bit=options.load_in_8bit,
        load_in_4bit=options.load_in_4bit,
        keep_quantized=options.keep_quantized,
        gguf_file=base.gguf_file,
    )
    if options.adapter is not None:
        model = pj.PeftModel.from_pretrained(
            model.resized_for(options.adapter), options.adapter, compute_dtype=options.compute_dtype
        )
        model = with_generation_config(model, read_generation_config(options.adapter))
    refuse_random(model)
    return model


def find_task(model: str | None, adapter: Path | None, gguf_file: str | None = None) -> Task:
    """The task of the adapter, or of the model alone.

    Raises:
        ValueError: If no base is named, or the commands are not for its task.
        FileNotFoundError: If it is not there.
    """
    base = find_base(model, adapter, gguf_file)
    return task_of_adapter(str(base.folder), adapter, base.gguf_file)


def find_base(model: str | None, adapter: Path | None, gguf_file: str | None = None) -> Base:
    """The base model that the options or the adapter name; what the adapter says of a GGUF file is of its own base.

    Raises:
        ValueError: If neither the words nor the adapter name one.
        FileNotFoundError: If it is not there.
    """
    if adapter is None:
        if model is None:
            raise ValueError("no model is given. Name one with --model, or an adapter with --adapter.")
        return Base(model, find_checkpoint(model, base_files(gguf_file)), gguf_file)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    if model is not None:
        return Base(model, find_checkpoint(model, base_files(gguf_file)), gguf_file)
    if not named:
        raise ValueError(f"the adapter in {adapter} names no base model. Give it with --model.")
    gguf_file = gguf_file or read_base_file(adapter)
    try:
        return Base(named, find_checkpoint(named, base_files(gguf_file)), gguf_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base model of {adapter} is not there: {error} Or give it with --model."
        ) from error


def find_tokenizer(model: str | None, adapter: Path | None, gguf_file: str | None = None) -> Any:
    """The tokenizer in the adapter's folder if it has one, else the base's.

    Raises:
        ValueError: If there is none that can be read.
    """
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return read_tokenizer(adapter)
    base = find_base(model, adapter, gguf_file)
    return read_tokenizer(base.folder, gguf_file=base.gguf_file)
