"""LoRA-GA: LoRA starts at the directions of a weight's gradient.

Wang et al., 2024, https://arxiv.org/abs/2407.05000, equations 12 and 14. Numbers follow PEFT 0.21.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.methods.lora.initializers import from_weight
from peft_jax.methods.lora.initializers.base import Factors
from peft_jax.methods.lora.nested_configs import LoraGAConfig


def initialize(
    matrix: jax.Array,
    gradient: jax.Array,
    rank: int,
    scale: float,
    options: LoraGAConfig,
    key: jax.Array,
    stored_in_out: bool = False,
) -> Factors:
    """LoRA-GA's start: the directions of the gradient, so that the first step is near that of full fine-tuning.

    Args:
        matrix: ``(in, out)``.
        gradient: Of the loss by the matrix.
        rank: How many directions for each factor.
        scale: The adapter's.
        options: Which of the ``2 * rank`` largest directions A and B take, and how they are scaled.
        key: For ``direction="random"``, and for the decomposition.
        stored_in_out: Whether PyTorch stores the matrix so; PEFT's "stable" counts its first axis.
    """
    if 2 * rank > min(matrix.shape):
        raise ValueError(
            f"init_lora_weights='lora_ga' takes 2 * r = {2 * rank} directions of a weight that has "
            f"{min(matrix.shape)}. Choose a smaller r."
        )
    of_svd, of_choice = jax.random.split(key)
    u, s, vt = from_weight.fast_svd(gradient.T, min(4 * rank, *matrix.shape), 4, of_svd)
    both = {
        "ArBr": (np.arange(1, 2 * rank, 2), np.arange(0, 2 * rank, 2)),
        "A2rBr": (np.arange(rank, 2 * rank), np.arange(rank)),
        "ArB2r": (np.arange(rank), np.arange(rank, 2 * rank)),
    }
    if options.direction == "random":
        of_a = of_b = jax.random.permutation(of_choice, 2 * rank)[:rank]
    else:
        of_a, of_b = both[options.direction]  # type: ignore[assignment]
    a, b = vt[of_a].T, (u[:, of_b] * s[of_b][None]).T
    if options.scale == "stable":
        b = b * (matrix.shape[0 if stored_in_out else 1] ** 0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd":
        largest = jnp.linalg.svd(matrix, compute_uv=False)[0]
        b = jnp.where(s[of_b][0] > 0, b * largest / s[of_b][0], b)
    elif options.scale == "gd_scale":
        a, b = a / scale, b / scale
    return Factors(a, b, matrix - scale * a @ b)
