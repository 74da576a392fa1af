"""Linear biases of scores in place of positions (ALiBi): Press et al., 2021 (https://arxiv.org/abs/2108.12409)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.positions import Places


def alibi_slopes(heads: int) -> np.ndarray:
    """How much the score of each head grows from one key to the next, float32 (heads,).

    Example:
        >>> alibi_slopes(3).tolist()
        [0.0625, 0.00390625, 0.25]
    """
    whole = 2 ** math.floor(math.log2(heads))
    base = np.float32(2 ** -(2 ** -(math.log2(whole) - 3)))
    slopes = base ** np.arange(1, 1 + whole, dtype=np.float32)
    finer = np.float32(2 ** -(2 ** -(math.log2(2 * whole) - 3)))
    rest = finer ** np.arange(1, 1 + 2 * (heads - whole), 2, dtype=np.float32)
    return np.concatenate([slopes, rest]).astype(np.float32)


def alibi(heads: int, places: Places, inputs: ForwardInputs, dtype: DTypeLike) -> jax.Array:
    """The bias of scores, (batch or 1, heads, 1, n_virtual + kv_len), as transformers computes it.

    It grows with the number of a key's token in its row, and not with its distance: a softmax takes away what is
    alike for all keys. Padding is not counted, and position_ids say nothing.

    Args:
        heads: The number of heads.
        places: The places of the inputs.
        inputs: The inputs.
        dtype: Element type of the products of slopes and numbers, to which both are rounded first.
    """
    slots = places.mask.shape[2]
    numbers = jnp.arange(slots)[None]
    if inputs.attention_mask is not None:
        virtual = inputs.virtual
        counted = inputs.attention_mask.astype(jnp.int32)
        rest = slots - virtual - counted.shape[1]
        counted = jnp.pad(jnp.pad(counted, ((0, 0), (virtual, 0)), constant_values=1), ((0, 0), (0, rest)))
        numbers = (jnp.cumsum(counted, axis=1) - 1) * counted
    slopes = jnp.asarray(alibi_slopes(heads), dtype)
    return slopes[None, :, None, None] * numbers[:, None, None].astype(dtype)
