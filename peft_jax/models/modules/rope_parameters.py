"""The parameters of rotary positions: transformers' ``rope_parameters``, of a model or of each kind of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.core.config_ranges import check_fields_of
from peft_jax.core.selecting import field_names
from peft_jax.core.strict_json import shown

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
# Those without which transformers computes nothing.
NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"linear": ("factor",), "dynamic": ("factor",), "llama3": USED["llama3"], "longrope": LISTS}
)


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
        check_fields_of(self)
        if self.rope_type not in USED:
            raise ValueError(f"rope_type={shown(self.rope_type)} is not supported. Supported: {', '.join(USED)}.")

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], also: Collection[str] = ()) -> RopeParameters:
        """Read transformers' ``rope_parameters`` of one kind of layer.

        Args:
            parameters: The dict, as `transformers` completes it.
            also: Further keys that may be there; the caller reads them.

        Raises:
            ValueError: The dict has a key that is not known.
        """
        if not isinstance(parameters, Mapping):
            raise ValueError(f"rope_parameters={shown(parameters)} are not supported. Write an object.")
        if "rope_type" not in parameters:
            raise ValueError(
                f"Rotary parameters per kind of layer are not supported, got rope_parameters={dict(parameters)}."
            )
        kind = parameters["rope_type"]
        if not isinstance(kind, str):
            raise ValueError(f"rope_type={shown(kind)} is not supported. Supported: {', '.join(USED)}.")
        if missing := [name for name in NEEDED.get(kind, ()) if parameters.get(name) is None]:
            raise ValueError(f"rope_parameters with rope_type={kind!r} need {', '.join(missing)}. Write numbers.")
        surplus = sorted(parameters.keys() - {*field_names(cls), "type", *also})
        if surplus:
            raise ValueError(f"rope_parameters {surplus} are not supported with rope_type={kind!r}.")
        values: dict[str, Any] = {"rope_type": kind}
        for name in ("rope_theta", "partial_rotary_factor", *USED.get(kind, ())):
            value = parameters.get(name)
            if value is not None:
                values[name] = tuple(value) if name in LISTS and isinstance(value, list) else value
        if parameters.get("factor") is None and kind in ("yarn", "longrope"):
            values["factor"] = None
        if isinstance(values.get("rope_theta"), int):
            values["rope_theta"] = float(values["rope_theta"])
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dict that `from_hf` reads as this."""
        hf: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": self.rope_type}
        if self.partial_rotary_factor != 1:
            hf["partial_rotary_factor"] = self.partial_rotary_factor
        for name in USED[self.rope_type]:
            value = getattr(self, name)
            is_default = self.rope_type == "proportional" and value == 1  # transformers leaves it out there
            if value is not None and not is_default:
                hf[name] = list(value) if name in LISTS else value
        return hf


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
