"""What a release says of itself: versions, extras, bounds, and the page that the package index shows."""

import re
import runpy
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REPOSITORY = "https://example.org/owner/name"
RELATIVE = re.compile(r"\]\((?!https?://|mailto:)|(?:src|srcset|href)=\"(?!https?://|mailto:)")


@pytest.fixture
def index_page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The function of setup.py, which is given to no setuptools here."""
    setuptools = pytest.importorskip("setuptools", reason="newer Pythons have it in the building environment alone")
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    names = runpy.run_path("setup.py")
    assert given["long_description_content_type"] == "text/markdown"
    function: Callable[..., str] = names["index_page"]
    repository = PROJECT.get("urls", {}).get("Repository")
    assert given["long_description"] == function((ROOT / "README.md").read_text(), repository, PROJECT["version"])
    return function


# Of the README's Markdown: what the index shows with a repository, and without one.
PIECES = {
    "[the models](docs/models.md)": (f"[the models]({REPOSITORY}/blob/v1.2/docs/models.md)", "the models"),
    "[how](docs/models.md#top)": (f"[how]({REPOSITORY}/blob/v1.2/docs/models.md#top)", "how"),
    "[below](#finetune)": (f"[below]({REPOSITORY}/blob/v1.2/README.md#finetune)", "below"),
    "![Loss](examples/demo-loss.png)": (f"![Loss]({REPOSITORY}/raw/v1.2/examples/demo-loss.png)", ""),
    '<img width="9" src="examples/demo-loss.png">': (
        f'<img width="9" src="{REPOSITORY}/raw/v1.2/examples/demo-loss.png">',
        "",
    ),
    '<a href="LICENSE">licence</a>': (f'<a href="{REPOSITORY}/blob/v1.2/LICENSE">licence</a>', "<a>licence</a>"),
    "[PEFT](https://github.com/huggingface/peft)": ("[PEFT](https://github.com/huggingface/peft)",) * 2,
    'x = params["q"](x)': ('x = params["q"](x)',) * 2,
}


@pytest.mark.parametrize("piece", PIECES)
def test_links_and_pictures_lead_into_the_repository(piece: str, index_page: Callable[..., str]) -> None:
    with_repository, without = PIECES[piece]
    assert index_page(f"a {piece} b", REPOSITORY, "1.2") == f"a {with_repository} b"
    assert index_page(f"a {piece} b", None, "1.2") == f"a {without} b"


def test_the_page_of_the_index_has_no_relative_link(index_page: Callable[..., str]) -> None:
    readme = (ROOT / "README.md").read_text()
    assert RELATIVE.search(readme), "the README has links to files"
    for repository in (REPOSITORY, None):
        found = RELATIVE.search(index_page(readme, repository, "1.2"))
        assert found is None, f"index_page in setup.py leaves a link that leads nowhere: {found}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys(), "what the format asks for"
    assert str(citation["version"]) == PROJECT["version"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_changelog_begins_with_what_comes_next_or_with_this_version() -> None:
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first is not None
    assert first[1] == "Unreleased" or re.fullmatch(rf"{re.escape(PROJECT['version'])} \(\d{{4}}-\d\d-\d\d\)", first[1])


def test_every_dependency_has_a_version_to_test() -> None:
    """`make test-oldest` takes the lowest: a requirement without one would take any that there ever was."""
    requirements = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    unbounded = [one for one in requirements if not one.startswith("peft-jax[") and not re.search(r"[>=]=\s*\d", one)]
    assert not unbounded


def test_extras_that_are_named_exist() -> None:
    """In messages, documents and commands: `peft-jax[gguf]` and `pip install ".[examples]"`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / path for path in listed.stdout.split("\0") if path]
    if listed.returncode:  # a source distribution is no clone
        paths = [path for folder in ("peft_jax", "docs", "tests") for path in (ROOT / folder).rglob("*.*")]
    named: dict[str, str] = {}
    for path in paths:
        if path.suffix in (".py", ".md", ".toml", "") and path.is_file():
            found = re.findall(r"(?:peft-jax|['\"]\.)\[([a-z][\w,-]*)\]", path.read_text(errors="replace"))
            named |= {name: str(path) for names in found for name in names.split(",")}
    assert {"gguf", "datasets", "test"} <= named.keys()
    assert not {name: path for name, path in named.items() if name not in EXTRAS}
