"""Config fields that many methods share, documented once: which modules and layers an adapter goes on.

A config class inherits those groups that PEFT's class has.
"""

import dataclasses
from collections.abc import Sequence


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
