"""Lets the benchmarks run on an image where peft_jax is not installed and not all that it needs is there.

`prepare` puts this folder's project on the path. Of the packages that peft_jax needs, jaxtyping alone is imported by
every module, and it does nothing at run time but name the axes of arrays in annotations: where it is missing, a module
of the same names stands in for it. What else may be missing (grain, matplotlib, tyro) is imported by nothing here.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Axes:
    """Stands for ``Float`` and its like in annotations: ``Float[Array, "in out"]`` is ``Array``."""

    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        """The type of an array, without its axes."""
        return item[0]


def prepare() -> None:
    """Make ``import peft_jax`` work from the project's folder, whatever of its light dependencies is missing."""
    if importlib.util.find_spec("jaxtyping") is None:
        sys.modules["jaxtyping"] = jaxtyping()
    if importlib.util.find_spec("peft_jax") is None:
        sys.path.insert(0, str(ROOT))
    import peft_jax

    if importlib.util.find_spec("peft_jax.interop") is None:  # the folder interop/, as an installation places it
        peft_jax.__path__.append(str(ROOT))


def jaxtyping() -> ModuleType:
    """A module with the names that peft_jax imports from jaxtyping."""
    import jax

    stand_in = ModuleType("jaxtyping")
    stand_in.Array = jax.Array  # type: ignore[attr-defined]
    for name in ("Bool", "Float", "Int", "Shaped"):
        setattr(stand_in, name, Axes)
    return stand_in
