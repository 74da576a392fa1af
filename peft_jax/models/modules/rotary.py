"""Rotary positions: every kind of stretched frequencies that transformers has, and the rotations by them.

The formulas are those of transformers' ``modeling_rope_utils``: Su et al., 2021 (https://arxiv.org/abs/2104.09864),
with YaRN (https://arxiv.org/abs/2309.00071) and LongRoPE (https://arxiv.org/abs/2402.13753).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The fields that each kind of rope uses beside its base.
USED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "yarn": (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "longrope": (
            *("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
        ),
        "proportional": ("factor",),
    }
)
LISTS = ("short_factor", "long_factor")
BY_LENGTH = ("dynamic", "longrope")  # the kinds whose frequencies depend on the length of the texts


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """How far each pair of features turns from one position to the next: transformers' ``rope_parameters``.

    Attributes:
        rope_type: One of the keys of `USED`, which says what it uses of the other fields.
        factor: By how much positions are stretched; None for the ratio of the model's length to that of pretraining.
        low_freq_factor: "llama3": wavelengths above original_max_position_embeddings / low_freq_factor are divided.
        high_freq_factor: "llama3": wavelengths below original_max_position_embeddings / high_freq_factor are kept.
        original_max_position_embeddings: The length of pretraining.
        rope_theta: The base.
        partial_rotary_factor: The part of a head's features that is turned.
        attention_factor: "yarn", "longrope": what rotations are multiplied by; None for the papers' value.
        beta_fast: "yarn": pairs of features with more turns within the length of pretraining keep their frequency.
        beta_slow: "yarn": pairs with fewer turns have theirs divided.
        mscale: "yarn": with mscale_all_dim, gives attention_factor.
        mscale_all_dim: See mscale.
        truncate: "yarn": whether the two bounds are rounded to whole pairs.
        short_factor: "longrope": what each frequency is divided by up to the length of pretraining.
        long_factor: "longrope": and beyond it.

    Raises:
        ValueError: There is no such kind of rope.

    Example:
        >>> RopeParameters.from_hf({"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}).factor
        2.0
    """

    rope_type: str = "default"
    factor: float | None = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in USED:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported. Supported: {', '.join(USED)}.")

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], also: Collection[str] = ()) -> RopeParameters:
        """Read transformers' ``rope_parameters`` of one kind of layer.

        Args:
            parameters: The dict, as `transformers` completes it.
            also: Further keys that may be there; the caller reads them.

        Raises:
            ValueError: The dict has a key that is not known.
        """
        if "rope_type" not in parameters:
            raise ValueError(
                f"Rotary parameters per kind of layer are not supported, got rope_parameters={dict(parameters)}."
            )
        kind = parameters["rope_type"]
        known = {field.name for field in dataclasses.fields(cls)}
        surplus = sorted(parameters.keys() - known - {"type", *also})
        if surplus:
            raise ValueError(f"rope_parameters {surplus} are not supported with rope_type={kind!r}.")
        values: dict[str, Any] = {"rope_type": kind}
        for name in ("rope_theta", "partial_rotary_factor", *USED.get(kind, ())):
            value = parameters.get(name)
            if value is not None:
                values[name] = tuple(value) if name in LISTS else value
        if parameters.get("factor") is None and kind in ("yarn", "longrope"):
            values["factor"] = None
        values["rope_theta"] = float(values.get("rope_theta", cls.rope_theta))
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `from_hf` reads as this."""
        hf: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": self.rope_type}
        if self.partial_rotary_factor != 1:
            hf["partial_rotary_factor"] = self.partial_rotary_factor
        for name in USED[self.rope_type]:
            value = getattr(self, name)
            if value is not None:
                hf[name] = list(value) if name in LISTS else value
        return hf


class Rotation(NamedTuple):
    """Cosines and sines of the angles, each (batch or 1, length, 1, features), of the first features of a head."""

    cos: jax.Array
    sin: jax.Array


def ropes_by_kind(
    parameters: Mapping[str, Any], kinds: Collection[str], also: Collection[str] = ()
) -> dict[str, RopeParameters | None]:
    """The ropes of several kinds of layers; None for a kind whose layers turn nothing.

    Args:
        parameters: transformers' ``rope_parameters``: by kind, or of all layers.
        kinds: The kinds of layers that there are.
        also: As in `RopeParameters.from_hf`.

    Raises:
        ValueError: A kind has no entry; also as `RopeParameters.from_hf`.

    Example:
        >>> parameters = {"full": {"rope_type": "default", "rope_theta": 1e6}, "short": None}
        >>> ropes = ropes_by_kind(parameters, ["full", "short"])
        >>> ropes["full"].rope_theta, ropes["short"]
        (1000000.0, None)
    """
    if "rope_type" in parameters:
        rope = RopeParameters.from_hf(parameters, also)
        return dict.fromkeys(sorted(kinds), rope)
    ropes: dict[str, RopeParameters | None] = {}
    for kind in sorted(kinds):
        if kind not in parameters:
            raise ValueError(f"rope_parameters have no entry for layers of kind {kind!r}, got {sorted(parameters)}.")
        own = parameters[kind]
        # transformers looks for `truncate` beside the kinds, where it is not.
        ropes[kind] = None if own is None else dataclasses.replace(RopeParameters.from_hf(own, also), truncate=True)
    return ropes


def ropes_to_hf(ropes: Mapping[str, RopeParameters | None], *, nested: bool) -> dict[str, Any]:
    """The dict that `ropes_by_kind` reads as these.

    Args:
        ropes: The ropes by kind of layer.
        nested: Whether each kind has an entry; otherwise all kinds have one rope.

    Raises:
        ValueError: There are several ropes, and not nested ones.
    """
    if nested:
        return {kind: None if rope is None else rope.to_hf() for kind, rope in ropes.items()}
    found = set(ropes.values())
    if len(found) > 1:
        raise ValueError(f"transformers has one rope for all layers of such a model, got {len(found)} unlike ones.")
    rope = found.pop() if found else None
    return {} if rope is None else rope.to_hf()


def rotation(
    rope: RopeParameters,
    head_dim: int,
    positions: jax.Array,
    max_positions: int,
    dtype: Any,
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
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        crossed = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    else:
        left, right = jnp.split(x, 2, axis=-1)
        crossed = jnp.concatenate([-right, left], axis=-1)
    turned: jax.Array = x * turn.cos + crossed * turn.sin
    return turned.astype(x.dtype)


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
