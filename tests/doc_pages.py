"""The pages of the documents: README.md and all of docs/, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}  # by their paths


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """The commands of the shell blocks of a page, one a line; each ends where the shell's ``&&`` does."""
    found: list[str] = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in line.split(" && ")]
    return [command for command in found if command and not command.startswith("#")]
