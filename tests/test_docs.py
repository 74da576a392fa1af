"""The Python blocks of README.md and docs/, and docstring examples, executed."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from doc_pages import PAGES, ROOT, blocks

import peft_jax

PROGRAMS = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(autouse=True)
def as_a_reader_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's own settings, not the strict ones of the other tests, and a folder to write into."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def all_modules() -> list[str]:
    """All modules of all packages, however deep; the folder interop/ is not in the path of peft_jax."""
    found = {"peft_jax", "peft_jax.interop"}
    for name in tuple(found):
        package = importlib.import_module(name)
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")}
    return sorted(found)


@pytest.mark.parametrize("name", all_modules())
def test_docstring_examples(name: str) -> None:
    names = {"jax": jax, "jnp": jnp, "pj": peft_jax}  # the imports that every example takes for granted
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=flags).failed == 0


@pytest.mark.parametrize("page", PROGRAMS)
def test_python_blocks(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of a page runs from top to bottom as one program, and prints the page's blocks of output."""
    names: dict[str, object] = {"__name__": page}
    for number, block in enumerate(blocks(page, "python"), 1):
        if "from peft import" in block:
            pytest.importorskip("peft")
        exec(compile(block, f"{page}, Python block {number}", "exec"), names)
    printed = re.sub(r" at .*?(:\d+): ", r" at attend.py\1: ", capsys.readouterr().out)  # the file that a reader has
    for block in blocks(page, "output"):
        assert block in printed


def test_the_page_of_models_is_written_from_the_registry() -> None:
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "tools" / "model_table.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "models.md").read_text() == tool.table(), "docs/models.md is not up to date: make models"
