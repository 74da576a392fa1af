"""LoRA of a convolution with groups: A convolves the inputs of all groups at once, B is a convolution with groups.

Each group's outputs take their own part of the rank. The form is that of PEFT 0.21.2. Since A lets a group see the
inputs of the others, no kernel of the convolution computes the same, and the adapter is not merged.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from peft_jax.core.layout import Layout
from peft_jax.core.weight import MergeError
from peft_jax.methods.lora.bdlora import BLOCKS


def shapes(
    config: Any, module: str, layout: Layout, whole: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays: ``lora_A`` ``(groups * in, rank)``, ``lora_B`` ``(rank / groups, out)``.

    Args:
        config: The `peft_jax.LoraConfig`.
        module: Path of the module.
        layout: Axes of its kernel.
        whole: Shapes for the same kernel in a convolution without groups.

    Raises:
        ValueError: if the rank cannot be divided, or an option is not for such a convolution.
    """
    groups, ((n_in, rank), (_, n_out)) = layout.groups, (whole["lora_A"], whole["lora_B"])
    if rank % groups:
        raise ValueError(
            f"'{module}' is a convolution of {groups} groups, which share the rank, and it is {rank}. Choose a "
            f"multiple of {groups}, here by rank_pattern, or do not target it."
        )
    wrong = {}
    if config.initializer.needs != "nothing":
        wrong["init_lora_weights"] = config.init_lora_weights
    for field in ("alora_invocation_tokens", "target_parameters"):
        if value := getattr(config, field):
            wrong[field] = value
    if layout.stack and config.rank_pattern:
        wrong["rank_pattern"] = config.rank_pattern
    if wrong:
        raise ValueError(
            f"'{module}' is a convolution of {groups} groups, whose LoRA does not go with {wrong}. Leave it, or do "
            "not target the module."
        )
    return {**whole, "lora_A": (groups * n_in, rank), "lora_B": (rank // groups, n_out)}


def groups_of(params: Mapping[str, jax.Array]) -> int:
    """Of how many groups the convolution is that an adapter with both factors is on; 1 for all other weights.

    Of BD-LoRA's B it is the number of blocks.
    """
    return params["lora_A"].shape[-1] // params["lora_B"].shape[-2]


def check_merge(params: Mapping[str, jax.Array], state: Mapping[str, Any]) -> None:
    """Raise MergeError for the adapter of a convolution with groups."""
    if "lora_B" in params and BLOCKS not in state and groups_of(params) > 1:
        raise MergeError(
            "The LoRA of a convolution with groups has outputs of one group see the inputs of all, which no kernel of "
            "it does. Keep the adapter apart."
        )


def norm_kernel(a: Float[Array, "inputs rank"], b: Float[Array, "group_rank out"]) -> Float[Array, "group_inputs out"]:
    """The kernel whose norms DoRA has in PEFT: all ranks of several outputs' B times A, cut into the kernel's shape.

    It is no change that the adapter makes; DoRA's n of a trained adapter is made of it all the same.
    """
    (inputs, rank), (group_rank, out) = a.shape, b.shape
    groups = rank // group_rank
    rows = b.T.reshape(out // groups, rank) @ a.T
    return rows.reshape(out, inputs // groups).T


def check_plain(path: str, layout: Layout) -> None:
    """Raise ValueError if a leaf is the kernel of a convolution with groups, where a start looks at data."""
    if layout.groups > 1:
        raise ValueError(
            f"Leaf '{path}' is a convolution of {layout.groups} groups, whose LoRA does not start at what data say. "
            "Do not target it."
        )
