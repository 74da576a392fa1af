"""Adapters of one kind as those of another."""

from collections.abc import Mapping

import numpy as np

from peft_jax.methods.base import Method
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.initializers.table import TABLE
from peft_jax.methods.lora.variants import variant_of

RANK_AXES = {"lora_A.weight": 0, "lora_B.weight": 1}


def without_start(
    config: Method, tensors: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """A LoRA on the base that it was started from, given one on what its start left of the base.

    With the start ``A0 B0`` the base is ``W = W' + s A0 B0``, so that ``W' + s A B`` is ``W + s [A, A0] [B; -B0]``.

    Args:
        config: The adapter's config.
        tensors: Its tensors under PEFT's keys.
        initial: Its tensors before training.

    Raises:
        ValueError: if the adapter did not start in the base, or the initial one is another adapter's.
    """
    init = config.init_lora_weights if isinstance(config, LoraConfig) else None
    if not isinstance(config, LoraConfig) or not (init is True or config.initializer.converts):
        known = ", ".join(str(row.value) for row in TABLE if row.converts)
        raise ValueError(
            "path_initial_model_for_weight_conversion is for LoRA that starts in the base "
            f"({known}), and this is {config.peft_type} with init_lora_weights={init!r}. "
            "Save it without."
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "An adapter with use_rslora=True and rank_pattern or alpha_pattern cannot be converted: one lora_alpha "
            "does not suit twice of unlike ranks. Save it without path_initial_model_for_weight_conversion."
        )
    if variant := variant_of(config):
        raise ValueError(f"An adapter with {variant} is no plain LoRA, and is not converted. Save it without.")
    doubled = dict(tensors)
    for key, tensor in tensors.items():
        axis = RANK_AXES.get(".".join(key.split(".")[-2:]))
        if axis is None:
            continue
        if key not in initial or initial[key].shape != tensor.shape:
            raise ValueError(f"The initial adapter has no {key} of shape {tensor.shape}. Give the folder of its start.")
        start = initial[key].astype(tensor.dtype)
        doubled[key] = np.concatenate([tensor, -start if axis else start], axis=axis)
    config = config.replace(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (2**0.5 if config.use_rslora else 2),
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: 2 * alpha for name, alpha in config.alpha_pattern.items()},
    )
    return config, doubled
