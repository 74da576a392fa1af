"""Public names of a package that are imported when somebody asks for them.

``import peft_jax`` costs no import of JAX, Flax or transformers, and ``peft-jax --help`` does without them.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package whose public names are imported one by one, on first use."""

    def __getattr__(self, name: str) -> Any:
        """Import a public name, or a subpackage; Python asks here for what is not in the package yet."""
        source = _sources(self).get(name)
        if source is not None and source != self.__name__:
            value = getattr(importlib.import_module(source), name)
        else:
            value = _subpackage(self, name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless the import system binds a subpackage that has the name of a public function.

        After ``import peft_jax.adapt.rules`` it would bind ``peft_jax.adapt`` to the package, not to the function.
        """
        source = _sources(self).get(name)
        shadows = isinstance(value, ModuleType) and source is not None and source != self.__name__
        if not shadows:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """All names, imported or not, for tab completion."""
        return sorted({*super().__dir__(), *_sources(self)})


def import_lazily(package: str) -> None:
    """Make a package import its public names on first use.

    They are the names ``X`` of the lines ``from ... import X as X`` in the package's file, and those that another
    package has in this way, in a line ``from ... import *``. These lines are under ``if TYPE_CHECKING:``, where type
    checkers and editors read them; this function reads the same lines.

    Args:
        package: The ``__name__`` of the package, which calls this in its ``__init__.py``.

    Example:
        >>> import sys
        >>> sys.modules["peft_jax"].merge.__module__
        'peft_jax.core.merge'
    """
    module = sys.modules[package]
    sources = public_names(package)
    vars(module)["_sources"] = sources
    vars(module)["__all__"] = list(sources)
    module.__class__ = LazyPackage


def public_names(package: str) -> dict[str, str]:
    """The names that a package's file imports for others, and the module that each is imported from.

    Example:
        >>> public_names("peft_jax.quant")["quantize"]
        'peft_jax.quant.quantize'
    """
    sources: dict[str, str] = {}
    for node in ast.walk(ast.parse(_source_code(package))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            if alias.name == "*":
                sources.update(dict.fromkeys(public_names(node.module), node.module))
            elif alias.asname == alias.name:
                sources[alias.name] = node.module
    return sources


def _source_code(package: str) -> str:
    spec = importlib.util.find_spec(package)
    loader: Any = None if spec is None else spec.loader
    code = None if loader is None else loader.get_source(package)
    if code is None:
        raise ImportError(f"{package} is installed without its source code, which lists its names. Install a wheel.")
    return str(code)


def _sources(package: ModuleType) -> Mapping[str, str]:
    """The module that each public name is imported from."""
    return vars(package)["_sources"]


def _subpackage(package: ModuleType, name: str) -> ModuleType:
    path = f"{package.__name__}.{name}"
    unknown = AttributeError(f"module '{package.__name__}' has no attribute '{name}'", name=name, obj=package)
    if name.startswith("_"):
        raise unknown
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise unknown from None
