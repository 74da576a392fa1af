"""QA-LoRA: the inputs of a quantization group share a row of A, so that a merged change is one of zero points.

Xu et al., 2023, https://arxiv.org/abs/2309.14717. A is ``(in / group, rank)``, and takes the mean of the
inputs of each group, times the number of groups. Numbers follow PEFT 0.21.2, which has it for GPTQ's layers, ignores
the field on other ones, and does not merge it. Here it goes on any linear layer, and is merged as every LoRA.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.base import Arrays
from peft_jax.methods.fields import kaiming
from peft_jax.methods.lora.variant import Shapes, Variant

POOLED = "pooled"  # in the state: that A has a row for each group of inputs


class QaLora(Variant):
    """QA-LoRA as a row of the table of variants."""

    field = "use_qalora"
    reshapes = True

    def check(self, config: Any) -> None:
        """Raise ValueError if a group has no input."""
        if config.qalora_group_size < 1:
            raise ValueError(f"qalora_group_size is at least 1, got {config.qalora_group_size}.")

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """Those of plain factors, A with a row for each group.

        Raises:
            ValueError: if the groups do not divide the inputs.
        """
        group, (n_in, rank) = config.qalora_group_size, whole["lora_A"]
        if n_in % group:
            raise ValueError(
                f"use_qalora takes groups of qalora_group_size={group} inputs, and '{module}' has {n_in}. Choose a "
                "divisor."
            )
        return {**whole, "lora_A": (n_in // group, rank)}

    def drawn_roles(self, config: Any, module: str) -> tuple[str, ...]:
        """A."""
        return ("lora_A",)

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "groups rank"]:
        """A fresh A: as PyTorch's Linear with as many inputs."""
        return kaiming(key, shape, shape[0])

    def state(self, config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """That A has a row for each group."""
        return {POOLED: jnp.full(names.shape, True)}

    def factors(
        self,
        params: Arrays,
        state: Mapping[str, Any],
        a: Float[Array, "*groups rows rank"],
        b: Float[Array, "*groups rank out"],
        n_in: int,
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """A for the inputs themselves, and B."""
        return (expanded(a, n_in), b) if POOLED in state else (a, b)


def expanded(a: Float[Array, "*stack groups rank"], n_in: int) -> Float[Array, "*stack in rank"]:
    """A for the inputs themselves: ``groups / group_size`` times the row of each one's group."""
    groups = a.shape[-2]
    size = n_in // groups
    return jnp.repeat(a, size, axis=-2) * (groups / size)
