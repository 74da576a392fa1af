"""QA-LoRA: the inputs of a quantization group share a row of A, so that a merged change is one of zero points.

Xu et al., 2023, https://arxiv.org/abs/2309.14717. A is ``(in / group, rank)``, and takes the mean of the
inputs of each group, times the number of groups. Numbers follow PEFT 0.21.2, which has it for GPTQ's layers, ignores
the field on other ones, and does not merge it. Here it goes on any linear layer, and is merged as every LoRA.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.methods.fields import kaiming

POOLED = "pooled"  # in the state: that A has a row for each group of inputs


def shapes(group: int, module: str, whole: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays, given those of plain factors.

    Raises:
        ValueError: if the groups do not divide the inputs.
    """
    n_in, rank = whole["lora_A"]
    if n_in % group:
        raise ValueError(
            f"use_qalora takes groups of qalora_group_size={group} inputs, and '{module}' has {n_in}. Choose a divisor."
        )
    return {**whole, "lora_A": (n_in // group, rank)}


def initial(shape: tuple[int, ...], key: jax.Array) -> Float[Array, "groups rank"]:
    """A fresh A: as PyTorch's Linear with as many inputs."""
    return kaiming(key, shape, shape[0])


def expanded(a: Float[Array, "*stack groups rank"], n_in: int) -> Float[Array, "*stack in rank"]:
    """A for the inputs themselves: ``groups / group_size`` times the row of each one's group."""
    groups = a.shape[-2]
    size = n_in // groups
    return jnp.repeat(a, size, axis=-2) * (groups / size)
