"""The house's own rules: which way imports point, what is never imported, what the public face holds."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_jax

ROOT = Path(__file__).parents[1]
ROOMS = [
    "core",
    "adapt",
    "quant",
    "methods",
    "adapters",
    "prompts",
    "interop",
    "models",
    "train",
    "the public face",
    "cli",
]
FILES = sorted([*(ROOT / "peft_jax").rglob("*.py"), *(ROOT / "interop").rglob("*.py")])


def module_name(file: Path) -> list[str]:
    """The dotted name a file is imported by, in parts; the folder interop/ is peft_jax.interop."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["peft_jax", *parts] if parts[0] == "interop" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_names(file: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; `from a import b` counts as `a.b`."""
    package = module_name(file) if file.name == "__init__.py" else module_name(file)[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    parts = module_name(file)
    if len(parts) == 1:
        parts = ["peft_jax", "the public face"]
    for name in imported_names(file):
        if name.split(".")[0] == "peft_jax":
            room = name.split(".")[1] if "." in name else "the public face"
            assert room in ROOMS, f"{file} imports {name}: no such room"
            assert ROOMS.index(room) <= ROOMS.index(parts[1]), f"{file} imports {name}, which stands further down"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_torch_no_peft(file: Path) -> None:
    assert not {"torch", "peft"} & {name.split(".")[0] for name in imported_names(file)}


def test_every_package_is_in_the_wheel() -> None:
    packages = {".".join(module_name(file)) for file in FILES if file.name == "__init__.py"}
    assert {package.split(".")[1] for package in packages if "." in package} <= set(ROOMS)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(listed), "an editable installation finds them, a wheel has those listed"
    for package in packages:
        assert importlib.util.find_spec(package) is not None
    assert (ROOT / "peft_jax" / "py.typed").exists()


def test_no_two_modules_share_a_basename() -> None:
    """A reader who has an open file called `plan.py` knows which one it is."""
    shared = {"__init__", "base", "config", "model", "family", "registry"}
    commands = {"merge", "evaluate", "demo", "finetune", "generate", "inspect"}  # named in cli/ as they are typed
    seen: dict[str, Path] = {}
    for file in FILES:
        is_command = file.stem in commands and module_name(file)[1] == "cli"
        if file.stem not in shared and not is_command:
            other = seen.setdefault(file.stem, file)
            assert other == file, f"{other} and {file} share a name"


@pytest.mark.parametrize("name", [name.rsplit(".")[-1] for name in imported_names(ROOT / "peft_jax" / "__init__.py")])
def test_public_name_is_documented(name: str) -> None:
    value = getattr(peft_jax, name)
    if callable(value) or inspect.ismodule(value):
        assert inspect.getdoc(value), f"peft_jax.{name} has no docstring"


def test_interop_is_installed_inside_the_package(tmp_path: Path) -> None:
    """Seen from any other folder, as a user sees the installation."""
    code = "import importlib.util, peft_jax.interop; print(importlib.util.find_spec('interop'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"


PUBLIC_NAMES = """
import importlib, pickle, sys
import peft_jax as pj

heavy = {"jax", "flax", "transformers", "numpy"}
assert not heavy & sys.modules.keys(), "import peft_jax is quick"
listed = sys.argv[1:]
assert pj.__all__ == listed and set(listed) <= set(dir(pj))
assert not heavy & sys.modules.keys(), "tab completion is quick"

from peft_jax.methods.base import by_name

assert by_name("PREFIX_TUNING").__name__ == "PrefixTuningConfig", "prompts are found, though nobody imported them"

import peft_jax.adapt.rules
from peft_jax import LoraConfig, adapt

assert pj.adapt is adapt and adapt.__module__ == "peft_jax.adapt.interpreter", "the function, not the package"
assert pickle.loads(pickle.dumps(pj.adapt)) is adapt and pickle.loads(pickle.dumps(LoraConfig(r=3))) == LoraConfig(r=3)
assert pj.interop is importlib.import_module("peft_jax.interop") and callable(pj.interop.save_adapter)
assert pj.core is sys.modules["peft_jax.core"] and pj.train.make_training_step
for name in listed:
    assert getattr(pj, name) is vars(pj)[name]
for name in ("nothing", "_nothing", "torch"):
    try:
        getattr(pj, name)
    except AttributeError as error:
        assert str(error) == f"module 'peft_jax' has no attribute '{name}'"
    else:
        raise AssertionError(name)
names = {}
exec("from peft_jax import *", names)
assert set(listed) <= names.keys()
"""


def test_public_names_are_imported_on_first_use(tmp_path: Path) -> None:
    """In a process that has imported nothing yet."""
    face = ast.parse((ROOT / "peft_jax" / "__init__.py").read_text())
    listed = [
        alias.name
        for block in face.body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]
    assert len(listed) > 70
    command = [sys.executable, "-c", PUBLIC_NAMES, *listed]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
