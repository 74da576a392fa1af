"""Hooks of the site (`make docs`): README.md is its first page, and linked files outside of docs/ are pages.

Links are written as they work in the repository, such as ``../examples/adapt_plain.py``. On the site a Markdown file
outside of docs/ is a page, another text file a page with its source, and a picture is copied. The notebooks of
docs/notebooks/ are pages of their cells and the outputs that are stored in them.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FIRST, HOME = "README.md", "index.md"  # in the repository, on the site
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")  # relative ones: no scheme
PICTURES = (".png", ".svg")
NOTEBOOK = ".ipynb"
NOTEBOOKS = "Notebooks"  # the entry of the navigation
COLORS = re.compile(r"\x1b\[[0-9;]*m")
# Short code in prose, with the bracket before it and what ends a phrase behind it. Blocks have an empty span before.
SHORT_CODE = re.compile(r"[(\[]?(?<!</span>)<code>[^<]{1,36}</code>[)\],.;:]*")
WIDE_TABLES = ("models.md", "quantization.md", "lowering.md")  # their tables need the room of the contents beside them


def linked_paths(text: str, path: str) -> set[str]:
    """The repository paths of the files that a page at this repository path links to."""
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2])) for match in LINK.finditer(text)}
    return {target for target in found if (ROOT / target).is_file()}


def site_path(path: str) -> str:
    """Where a file of the repository is on the site, in the terms of the folder docs/."""
    if path == FIRST:
        return HOME
    if path.startswith("docs/"):
        return path.removeprefix("docs/").removesuffix(NOTEBOOK) + (".md" if path.endswith(NOTEBOOK) else "")
    if path.endswith((".md", *PICTURES)):
        return f"repository/{path}"
    return f"repository/{path}.md"


def repository_path(site: str) -> str:
    """The inverse of `site_path`, for pages."""
    if site == HOME:
        return FIRST
    if not site.startswith("repository/"):
        notebook = f"docs/{site.removesuffix('.md')}{NOTEBOOK}"
        return notebook if (ROOT / notebook).is_file() else f"docs/{site}"
    path = site.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def text_of(value: str | list[str]) -> str:
    """A text of a notebook, which is a string or a list of its lines."""
    return value if isinstance(value, str) else "".join(value)


def outputs_of(cell: dict[str, Any]) -> list[str]:
    """The Markdown of the outputs of a cell: pictures, and blocks of the texts between them."""
    found: list[str] = []
    printed = ""
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            found += [text_block(printed), picture(text_of(data["image/png"]))]
            printed = ""
        else:
            printed += text_of(output.get("text") or data.get("text/plain") or output.get("traceback") or "")
    found.append(text_block(printed))
    return [part for part in found if part]


def picture(encoded: str) -> str:
    """A picture in the page itself."""
    content = encoded.replace("\n", "")
    return f"![output](data:image/png;base64,{content})"


def text_block(text: str) -> str:
    """A printed text without colors, as a block; nothing for no text."""
    plain = COLORS.sub("", text).rstrip()
    return f"````text\n{plain}\n````" if plain else ""


def notebook_page(text: str) -> str:
    """The Markdown of a notebook: its cells, and the outputs that are stored in it."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"````python\n{source.rstrip()}\n````")
            parts += outputs_of(cell)
    return "\n\n".join(parts) + "\n"


def notebooks() -> list[str]:
    """The repository paths of the notebooks, in the order of their names."""
    return [f"docs/notebooks/{file.name}" for file in sorted((ROOT / "docs" / "notebooks").glob(f"*{NOTEBOOK}"))]


def page_of(path: str) -> str:
    """The Markdown of a file outside of docs/: its own, or its source."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(NOTEBOOK):
        return notebook_page(text)
    language = "python" if path.endswith(".py") else "text"
    return f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation; without any, it has no such entry."""
    pages = [site_path(path) for path in notebooks()]
    nav: list[Any] = []
    for entry in config.nav or []:
        if NOTEBOOKS not in entry:
            nav.append(entry)
        elif pages:
            nav.append({NOTEBOOKS: pages})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, the notebooks, and every file outside of docs/ that a page links to, or a page so linked."""
    for path in notebooks():
        files.append(File.generated(config, site_path(path), content=page_of(path)))
    to_read = [FIRST] + [repository_path(file.src_uri) for file in files.documentation_pages()]
    known = set(to_read)
    while to_read:
        path = to_read.pop()
        if not path.startswith("docs/"):
            added = (
                File.generated(config, site_path(path), abs_src_path=str(ROOT / path))
                if path.endswith(PICTURES)
                else File.generated(config, site_path(path), content=page_of(path))
            )
            files.append(added)
        if path.endswith((".md", NOTEBOOK)):
            new = linked_paths(page_of(path), path) - known
            known |= new
            to_read += sorted(new)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into those of the site. The first page has no pages beside it in the navigation."""
    if page.file.src_uri == HOME:
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri in WIDE_TABLES:
        page.meta["hide"] = ["toc"]
    here = repository_path(page.file.src_uri)
    if not here.endswith((".md", NOTEBOOK)):
        return markdown  # source

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        if not (ROOT / target).is_file():
            return match[0]  # the site's own check names it
        folder = posixpath.dirname(page.file.src_uri)
        return f"{match[1]}{posixpath.relpath(site_path(target), folder or '.')}{match[3]}"

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep short code on one line with its brackets and commas, which would begin or end a line alone."""
    return SHORT_CODE.sub(r'<span class="whole">\g<0></span>', html)
