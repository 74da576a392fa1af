"""A LoRA whose start looks at the training data: computed once, kept in the run's folder, taken up from there."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp

import peft_jax as pj
from peft_jax.adapters.restart import leaves_base, without_starts
from peft_jax.cli.finetune.options import Finetune
from peft_jax.cli.finetune.processes import is_first
from peft_jax.models.config import SEQ_2_SEQ_LM
from peft_jax.models.handles.base import ModelHandle
from peft_jax.train import steps_per_epoch, training_batches
from peft_jax.train.data.batches import Data

START = "start"  # folder of the adapter as it was before the first step
BATCHES = 8


def started(base: ModelHandle, config: pj.LoraConfig, options: Finetune, data: Data) -> Any:
    """The model with an adapter that started from the first batches, which is saved too.

    Raises:
        ValueError: If the start does not suit the model, the data or the other fields of the config.
    """
    init = config.init_lora_weights
    if init == "eva" and config.task_type == SEQ_2_SEQ_LM:
        raise ValueError(
            "init_lora_weights 'eva' finds padding by one mask, and an encoder-decoder has two. Take corda or lora_ga."
        )
    training = options.training
    rows = training.micro_batch_size or training.batch_size
    count = min(options.adapter.start_batches or BATCHES, steps_per_epoch(data, rows))
    batches = training_batches(data, rows, seed=training.seed)
    key = jax.random.key(training.seed)
    seen: list[dict[str, Any]] = [{**batches[number]} for number in range(count)]
    mask = _attended if seen[0]["labels"].ndim == 1 else None  # labels of texts leave no token out
    print(f"The adapter starts from {count} batches of {rows} rows ({init}).")
    model = pj.PeftModel.of(pj.apply_lora_from_data(base, config, seen, mask=mask, key=key))
    if leaves_base(config):
        _check_conversion(model)
    if is_first():
        model.save_pretrained(options.run.output / START)
    return model


def _attended(batch: Any) -> jax.Array:
    return jnp.asarray(batch["attention_mask"], jnp.float32)


def _check_conversion(model: pj.PeftModel) -> None:
    """Raise ValueError now if the adapter could not be saved in the end."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=folder)


def resumed(base: ModelHandle, output: Path) -> Any:
    """The same model again, of a run that goes on."""
    return without_starts(pj.PeftModel.from_pretrained(base, output / START, is_trainable=True))


def initial(model: pj.PeftModel, output: Path) -> Path | None:
    """Folder of the initial adapter, which is subtracted on saving; None where the base is unchanged."""
    start = output / START
    return start if start.is_dir() and leaves_base(model.peft_config["default"]) else None
