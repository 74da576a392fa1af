"""Rotations by positions, with every kind of stretched frequencies that transformers has.

The formulas are those of transformers' ``modeling_rope_utils``: Su et al., 2021 (https://arxiv.org/abs/2104.09864),
with YaRN (https://arxiv.org/abs/2309.00071) and LongRoPE (https://arxiv.org/abs/2402.13753).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peft_jax.models.modules.rope_parameters import RopeParameters

BY_LENGTH = ("dynamic", "longrope")  # the kinds whose frequencies depend on the length of the texts


class Rotation(NamedTuple):
    """Cosines and sines of the angles, each (batch or 1, length, 1, features), of the first features of a head."""

    cos: jax.Array
    sin: jax.Array


def rotation(
    rope: RopeParameters,
    head_dim: int,
    positions: jax.Array,
    max_positions: int,
    dtype: DTypeLike,
    *,
    interleaved: bool = False,
) -> Rotation:
    """The rotation of positions (batch or 1, length).

    Args:
        rope: The frequencies.
        head_dim: Features of a head.
        positions: Where the inputs stand.
        max_positions: The model's ``max_position_embeddings``.
        dtype: Element type of the result.
        interleaved: Whether the features 2i and 2i + 1 are a pair, not i and i + half of them.

    Example:
        >>> rotation(RopeParameters(), 8, jnp.arange(3)[None], 16, jnp.float32).cos.shape
        (1, 3, 1, 8)
    """
    seen = jnp.max(positions) + 1 if rope.rope_type in BY_LENGTH else None
    frequencies = inverse_frequencies(rope, head_dim, max_positions, seen)
    xp: Any = np if isinstance(frequencies, np.ndarray) else jnp
    repeated = xp.repeat(frequencies, 2) if interleaved else xp.tile(frequencies, 2)
    angles = positions.astype(jnp.float32)[:, :, None, None] * repeated[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(rope, max_positions)
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    return Rotation(cos.astype(dtype), sin.astype(dtype))


def rotate(x: jax.Array, turn: Rotation | None, *, interleaved: bool = False) -> jax.Array:
    """Turn the pairs of features of x (batch, length, heads, head_dim) by their positions' angles.

    Args:
        x: Queries or keys.
        turn: The rotation; features beyond its own, and all of them if there is none, stay as they are.
        interleaved: As it was made with.
    """
    if turn is None:
        return x
    size = turn.cos.shape[-1]
    if size < x.shape[-1]:
        rest = x[..., size:]
        return jnp.concatenate([rotate(x[..., :size], turn, interleaved=interleaved), rest], axis=-1)
    dtype = x.dtype
    if dtype.itemsize < turn.cos.dtype.itemsize:  # some models turn in float32 whatever their dtype
        x = x.astype(turn.cos.dtype)
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        crossed = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    else:
        left, right = jnp.split(x, 2, axis=-1)
        crossed = jnp.concatenate([-right, left], axis=-1)
    turned: jax.Array = x * turn.cos + crossed * turn.sin
    return turned.astype(dtype)


def inverse_frequencies(
    rope: RopeParameters, head_dim: int, max_positions: int, seen: jax.Array | int | None = None
) -> Any:
    """The rotary frequencies, float32 (rotated features / 2,), as transformers' ROPE_INIT_FUNCTIONS gives them.

    Args:
        rope: The parameters.
        head_dim: Features of a head.
        max_positions: The model's ``max_position_embeddings``.
        seen: One more than the largest position, on which some kinds depend; None for a short text.

    Returns:
        An array of NumPy where they do not depend on ``seen``.
    """
    if rope.rope_type == "proportional":
        return _proportional(rope, head_dim)
    dim = int(head_dim * rope.partial_rotary_factor)
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    frequencies = np.float32(1.0) / np.float32(rope.rope_theta) ** exponents
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "dynamic":
        return _dynamic(rope, exponents, dim, max_positions, seen)
    if rope.rope_type == "longrope":
        return _longrope(rope, exponents, seen)
    factor = np.float32(_factor(rope, max_positions))
    if rope.rope_type == "yarn":
        kept = _kept_by_yarn(rope, dim)
        powers = np.float32(rope.rope_theta) ** exponents
        return np.float32(1.0) / (factor * powers) * (1 - kept) + np.float32(1.0) / powers * kept
    slow = frequencies / factor
    if rope.rope_type == "linear":
        return slow
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelength  # within the context of pretraining
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return ((1 - smooth) * slow + smooth * frequencies).astype(np.float32)


def attention_factor(rope: RopeParameters, max_positions: int) -> float:
    """The factor of cosines and sines.

    Example:
        >>> round(attention_factor(RopeParameters("yarn", factor=4.0), 64), 4)
        1.1386
    """
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _factor(rope, max_positions)
    if rope.rope_type == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_max_position_embeddings))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(factor, rope.mscale) / _yarn_scale(factor, rope.mscale_all_dim)
    return _yarn_scale(factor, 1)


def score_factor(rope: RopeParameters, max_positions: int) -> float:
    """The factor of scores where models stretch them too, as DeepSeek's do with ``mscale_all_dim``.

    Example:
        >>> round(score_factor(RopeParameters("yarn", factor=4.0, mscale_all_dim=1.0), 64), 4)
        1.2965
    """
    if rope.rope_type != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return _yarn_scale(_factor(rope, max_positions), rope.mscale_all_dim) ** 2


def _factor(rope: RopeParameters, max_positions: int) -> float:
    return max_positions / rope.original_max_position_embeddings if rope.factor is None else rope.factor


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _kept_by_yarn(rope: RopeParameters, dim: int) -> np.ndarray:
    """How much of each frequency stays as it is, float32 (dim / 2,)."""

    def pair_with(turns: float) -> float:
        """The pair of features, fractional, that has so many turns within the length of pretraining."""
        span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast or 32), pair_with(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1)


def _dynamic(
    rope: RopeParameters, exponents: np.ndarray, dim: int, max_positions: int, seen: jax.Array | int | None
) -> Any:
    """Frequencies whose base grows with texts longer than the model was made for."""
    if seen is None:
        return np.float32(1.0) / np.float32(rope.rope_theta) ** exponents
    factor = _factor(rope, max_positions)
    length = jnp.maximum(seen, max_positions).astype(jnp.float32)
    growth = (factor * length / max_positions - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (rope.rope_theta * growth) ** exponents


def _longrope(rope: RopeParameters, exponents: np.ndarray, seen: jax.Array | int | None) -> Any:
    """Frequencies with a divisor of their own each, others for texts longer than those of pretraining."""
    short, long = (np.array(factors, np.float32) for factors in (rope.short_factor, rope.long_factor))
    powers = np.float32(rope.rope_theta) ** exponents
    if seen is None:
        return np.float32(1.0) / (short * powers)
    is_long = jnp.asarray(seen > rope.original_max_position_embeddings)
    return 1.0 / (jnp.where(is_long, long, short) * powers)


def _proportional(rope: RopeParameters, head_dim: int) -> np.ndarray:
    """Frequencies of the first pairs of a whole head; the others are 0."""
    turned = int(rope.partial_rotary_factor * head_dim // 2)
    exponents = np.arange(0, 2 * turned, 2).astype(np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.rope_theta) ** exponents
    return np.pad(frequencies, (0, head_dim // 2 - turned)) / np.float32(_factor(rope, 1))
