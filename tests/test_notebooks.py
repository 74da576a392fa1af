"""The notebooks, executed anew: they run from top to bottom, and print what is stored in them."""

import ast
import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
VARIES = "varies"  # the tag of a cell whose figures depend on versions and machine; its words do not


@pytest.fixture(autouse=True)
def as_a_reader_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's own settings, not the strict ones of the other tests, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def stored(cell: dict[str, Any]) -> str:
    """The text that a cell printed when it was stored."""
    assert all(output["output_type"] == "stream" for output in cell["outputs"]), "print what a reader is to see"
    return "".join("".join(output["text"]) for output in cell["outputs"])


def without_figures(text: str) -> str:
    """A text with a mark in place of each number.

    Example:
        >>> without_figures("step  9  loss 3.71")
        'step # loss #'
    """
    return re.sub(r"\s*-?\d+(\.\d+)?", " #", text)


def test_the_marks_of_figures_keep_words() -> None:
    assert without_figures("step  9  loss 3.71\n") == without_figures("step 11  loss 0.2\n") == "step #  loss #\n"
    assert without_figures("it fell: True") != without_figures("it fell: False")


def test_there_is_one_for_each_kind_of_user() -> None:
    assert [file.stem for file in NOTEBOOKS] == ["any_jax_function", "fine_tuning", "serving"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_prints_what_is_stored_in_it(file: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(stored(cell) for cell in cells), "make notebooks stores the outputs"
    for number, cell in enumerate(cells, 1):
        assert cell["execution_count"] == number, "it was not executed from top to bottom: make notebooks"
        source = "".join(cell["source"])
        assert not isinstance(ast.parse(source).body[-1], ast.Expr) or "print" in source, "its value would be shown"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"{file.name}, cell {number}", "exec"), names)
        want, got = stored(cell), printed.getvalue()
        if VARIES in cell["metadata"].get("tags", []):
            want, got = without_figures(want), without_figures(got)
        assert got == want, f"{file.name}, cell {number}: make notebooks"
