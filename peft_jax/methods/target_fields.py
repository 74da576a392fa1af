"""Config fields that many methods share, documented once: which modules and layers an adapter goes on.

A config class inherits those groups that PEFT's class has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFields:
    """Which modules are adapted, and which are trained whole.

    Attributes:
        target_modules: Names (ends of module paths), one regex for whole paths, or ``"all-linear"``.
        modules_to_save: Modules trained whole, beside the adapter.
    """

    target_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExcludeFields:
    """Which modules are left out.

    Attributes:
        exclude_modules: Names, or one regex, of modules to leave out.
    """

    exclude_modules: str | Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFields:
    """Which layers are adapted.

    Attributes:
        layers_to_transform: Index or indices of the layers to adapt; None for all.
        layers_pattern: Name of the list of layers, if it is not the first numbered one.
    """

    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None


class AbsentFields:
    """The fields that other packages read of every config, at the values that a method without such a field has."""

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = MappingProxyType({})
    alpha_pattern: Mapping[str, float] = MappingProxyType({})
    bias: str = "none"
    fan_in_fan_out: bool = False
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: Sequence[str] | None = None
    layer_replication: Sequence[Sequence[int]] | None = None
