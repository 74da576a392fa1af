"""docs/peft_names.md: every public name of PEFT has a row, and every name of ours in it exists."""

import importlib
import re
from pathlib import Path

import pytest

import peft_jax

PAGE = (Path(__file__).parents[1] / "docs" / "peft_names.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.MULTILINE)
OURS = re.compile(r"`pj\.([\w.]+)`")
PARTS = ("peft", "peft.utils", "peft.optimizers", "peft.functional")


def rows_of(part: str) -> dict[str, str]:
    """The rows of one section of the page."""
    section = PAGE.split(f"## {part}\n")[1].split("\n## ")[0]
    return dict(ROW.findall(section))


@pytest.mark.parametrize("part", PARTS)
def test_every_name_of_peft_has_a_row(part: str) -> None:
    pytest.importorskip("peft")
    theirs = set(importlib.import_module(part).__all__)
    rows = rows_of(part)
    assert theirs - rows.keys() == set(), "names of PEFT without a row"
    assert rows.keys() - theirs == set(), "rows of names that PEFT has not"


def test_every_name_of_ours_exists() -> None:
    names = set(OURS.findall(PAGE))
    assert len(names) > 60
    for name in names:
        value: object = peft_jax
        for part in name.split("."):
            value = getattr(value, part)


def test_a_name_that_both_have_is_mapped_to_itself() -> None:
    for part in PARTS:
        for name, words in rows_of(part).items():
            if name in peft_jax.__all__:
                assert words == f"`pj.{name}`"
            else:
                assert OURS.search(words) or len(words) > 10, f"{name} has neither a name of ours nor a reason"
