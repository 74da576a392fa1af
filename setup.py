"""The list of packages, found on disk, and the README as the package index shows it; the rest is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
TAG = re.compile(r'(<(img|source|a)\s[^<>]*?(?:src|srcset|href)=")([^"]+)("[^<>]*>)')


def index_page(readme: str, repository: str | None, version: str) -> str:
    """The README with links and pictures that work away from the repository.

    Args:
        readme: Markdown with links to files of the repository, which are relative. Other links stay as they are.
        repository: The repository's address; paths below it are GitHub's. With None, links become their words, and
            pictures are left out.
        version: The files are those of the tag ``v{version}``.
    """

    def is_ours(target: str) -> bool:
        return target.startswith("#") or (ROOT / target.partition("#")[0]).exists()

    def address(target: str, *, is_picture: bool) -> str:
        file = f"README.md{target}" if target.startswith("#") else target
        return f"{repository}/{'raw' if is_picture else 'blob'}/v{version}/{file}"

    def replaced_link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if not is_ours(target):
            return match[0]
        if repository:
            return f"{mark}[{words}]({address(target, is_picture=bool(mark))})"
        return "" if mark else words

    def replaced_tag(match: re.Match[str]) -> str:
        start, name, target, end = match.groups()
        if not is_ours(target):
            return match[0]
        if repository:
            return start + address(target, is_picture=name != "a") + end
        return "<a>" if name == "a" else ""

    return TAG.sub(replaced_tag, LINK.sub(replaced_link, readme))


project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The folder interop/ is imported as peft_jax.interop, so that no package called "interop" is installed.
inside = find_packages(include=["peft_jax", "peft_jax.*"])
interop = [f"peft_jax.{name}" for name in find_packages(include=["interop", "interop.*"])]
setup(
    packages=[*inside, *interop],
    package_dir={"peft_jax": "peft_jax", "peft_jax.interop": "interop"},
    long_description=index_page(
        (ROOT / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository"), project["version"]
    ),
    long_description_content_type="text/markdown",
)
