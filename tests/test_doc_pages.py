"""README.md and docs/: commands, flags, names and links in them exist. Their Python is run by test_docs.py."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import yaml
from doc_pages import PAGES, ROOT, commands

import peft_jax
from peft_jax import train
from peft_jax.cli.inspect.servers import PEFT_TYPES
from peft_jax.cli.main import COMMANDS, main, parse
from peft_jax.cli.shared.command_line import option_groups
from peft_jax.core.lazy_names import public_names
from peft_jax.methods.base import by_name, names

README = "README.md"
WRITTEN = [page for page in PAGES if not page.startswith("docs/reference/")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

# Programs of others, which are not run: their pages say so.
NOT_OURS = ("vllm", "text-generation-launcher", "curl")
# Flags of programs of others, and of pytest, in prose.
OTHER_FLAGS = {
    "--enable-lora",
    "--max-lora-rank",
    "--lora-modules",
    "--model-id",
    "--size",
    "--target",
}  # the last two: of benchmarks/
OF_ALL_COMMANDS = {"--debug", "--help"}
# Packages of others that a page installs, beside those of pyproject.toml.
INSTALLED = {"jax[tpu]", "jax[cuda12]"}


def flags_of(command: str) -> set[str]:
    """All flags of one of our commands."""
    found: set[str] = set()
    for _, group in option_groups(COMMANDS[command]):
        for parameter in group:
            found |= {*parameter.flags, *parameter.option.presets}
    return found


def check_ours(words: list[str]) -> None:
    """Our own parser reads the command."""
    parse(words)


def check_make(words: list[str]) -> None:
    """Every word but a setting is a target of the Makefile."""
    assert [word for word in words if word not in TARGETS and "=" not in word] == []


def check_python(words: list[str]) -> None:
    """Code runs; a program is a file that has the flags; a module is there."""
    if words[0] == "-c":
        exec(compile(ast.parse(words[1]), "command", "exec"), {})
    elif words[0] == "-m":
        __import__(words[1])
    else:
        fields = re.findall(r"^    (\w+):", (ROOT / words[0]).read_text(), flags=re.MULTILINE)
        flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
        assert flags <= set(fields), f"{words[0]} has no {flags - set(fields)}"


def check_pip(words: list[str]) -> None:
    """What is installed is this package with extras that it has, or a package of pyproject.toml."""
    install, *packages = words
    assert install == "install"
    for package in packages[: packages.index("--index-url") if "--index-url" in packages else None]:
        name, _, extras = package.removesuffix("]").partition("[")
        if name in (".", "peft-jax"):
            assert set(filter(None, extras.split(","))) <= EXTRAS.keys(), package
        else:
            assert package in INSTALLED or any(package in extra for extra in EXTRAS.values()), package


def check_not_ours(words: list[str]) -> None:
    """Nothing to check: the page says that it was not run."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "peft-jax": check_ours,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    ".venv/bin/python": check_python,
    ".venv-aot/bin/python": check_python,
    "pip": check_pip,
    ".venv/bin/pip": check_pip,
    **dict.fromkeys(NOT_OURS, check_not_ours),
}


def without_settings(words: list[str]) -> list[str]:
    """The words of a command without the variables that are set before it."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands(page: str) -> None:
    for command in commands(page):
        program, *words = without_settings(shlex.split(command, comments=True))
        assert program in CHECKS, f"nothing checks the command {command}"
        CHECKS[program](words)
        if program in NOT_OURS:
            assert "was not run here" in PAGES[page]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("peft-jax finetune --model m --data d --output o --lora-rnk 8", "lora-rnk"),
        ("peft-jax merge --output o", "adapter"),
        ("make tea", "tea"),
        ("python benchmarks/training_step.py --colour", "colour"),
        ("python examples/nowhere.py", "nowhere"),
        ("pip install .[nothing]", "nothing"),
        ("pip install torch==1.0", "torch"),
    ],
)
def test_a_wrong_command_is_found(command: str, error: str) -> None:
    program, *words = shlex.split(command)
    with pytest.raises((ValueError, AssertionError, OSError), match=error):
        CHECKS[program](words)


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_and_flags_in_prose(page: str) -> None:
    """Flags in backticks are ours, and so are the words behind ``make``, ``pip install`` and ``peft-jax``."""
    known = OF_ALL_COMMANDS | OTHER_FLAGS
    for command in COMMANDS:
        known |= flags_of(command)
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        program, *words = code.split()[:2] or [""]
        found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert found <= known, f"no command has {found - known}: {code}"
        if program == "make" and words and not words[0].startswith("-"):
            check_make(words)
        elif program == "peft-jax" and words:
            assert words[0] in (*COMMANDS, "COMMAND"), code
        elif program == "pip":
            check_pip([word.strip("'\"") for word in code.split()[1:]])


def test_extras_exist() -> None:
    """The table of extras names those of pyproject.toml, and so does every ``peft-jax[...]``."""
    table = PAGES["docs/install.md"].split("## Extras")[1].split("## ")[0]
    listed = set(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE))
    assert len(listed) > 5
    named = set(re.findall(r"peft-jax\[([\w-]+)\]", "".join(PAGES.values())))
    assert (listed | named) - EXTRAS.keys() == set()


@pytest.mark.parametrize("page", WRITTEN)
def test_names_exist(page: str) -> None:
    for name in re.findall(r"\bpj\.([\w.]*\w)(?!\w*\*)", PAGES[page]):
        value: object = peft_jax
        for part in name.split("."):
            value = getattr(value, part)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file.read_text()), f"{page} links to {target}, which has no such heading"


def test_the_readme_is_a_landing_page() -> None:
    text = PAGES[README]
    assert len(text.splitlines()) <= 150
    assert "`make test` runs" in text
    assert len(re.findall(r"!\[", text)) == 2, "a picture, and a plot of speed"
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for name in names():
        kind = "Prompts" if by_name(name).__module__.startswith("peft_jax.prompts") else "Methods"
        assert re.search(rf"\b{name}\b", rows[kind]), f"{name} is not in the row {kind}"


def test_the_page_of_limits_counts_the_types() -> None:
    missing = sorted(PEFT_TYPES - set(names()))
    count, of_peft = len(PEFT_TYPES) - len(missing), len(PEFT_TYPES)
    said = f"{count} of PEFT 0.21.2's {of_peft} types are here. Not yet: {', '.join(missing)}."
    all_are_here = f"All {of_peft} types of PEFT 0.21.2 are here."
    assert (said if missing else all_are_here) in PAGES["docs/guide/support.md"]


@pytest.mark.parametrize("page", [README, "docs/howto/tpu.md", "docs/howto/gpu.md"])
def test_memory_on_accelerators_is_that_of_the_compilers(page: str) -> None:
    found = re.findall(r"\| (\d+\.\d\d) \|", PAGES[page]) + re.findall(r"(\d+\.\d)\sGiB", PAGES[page])
    compiled = re.findall(r" \| (\d+\.\d\d) \| ", PAGES["docs/lowering.md"])
    known = {*compiled, *(f"{float(figure):.1f}" for figure in compiled)}
    assert len(found) > 1 and set(found) <= known


@pytest.mark.parametrize(
    ("page", "options"),
    [("docs/howto/serve.md", {}), ("docs/guide/commands.md", {"rank_pattern": {"q_proj": 4}})],
)
def test_inspect_says_what_the_page_says(
    page: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = {name: {"kernel": jnp.ones((8, 8))} for name in ("q_proj", "v_proj")}
    config = peft_jax.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **options)
    peft_jax.interop.save_adapter(peft_jax.apply_lora(params, config), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    (block,) = re.findall(r"^```\n(Taken by\n.*?)^```$", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    assert block.strip() in re.sub(" +$", "", capsys.readouterr().out, flags=re.MULTILINE)


def test_contributing_and_security_name_targets_of_make() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"(?:^    |`)make ([a-z-]+)", text, flags=re.MULTILINE)
    assert len(named) > 5 and set(named) <= TARGETS


@pytest.mark.parametrize(
    ("html", "wanted"),
    [
        ("(<code>a-b</code>),", '<span class="whole">(<code>a-b</code>),</span>'),
        ("or <code>--r</code>.", 'or <span class="whole"><code>--r</code>.</span>'),
        ("<pre><span></span><code>a\n</code></pre>", None),  # a block
        (f"<code>{'a' * 60}</code>,", None),  # longer than a phone is wide
    ],
)
def test_short_code_stays_with_its_commas(html: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    assert importlib.import_module("docs_hooks").on_page_content(html) == (wanted or html)


def test_a_notebook_is_a_page_of_its_cells_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    page = importlib.import_module("docs_hooks").notebook_page
    outputs = [
        {"text": ["1\n"]},
        {"text": "\x1b[1m2\n"},
        {"data": {"image/png": "AA\nBB"}},
        {"data": {"text/plain": "3"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    printed, picture, value = "````text\n1\n2\n````", "![output](data:image/png;base64,AABB)", "````text\n3\n````"
    wanted = "\n\n".join(["# A\nb", "````python\nprint(1)\n````", printed, picture, value])
    assert page(json.dumps({"cells": cells})) == wanted + "\n"


def test_each_public_name_is_in_the_reference_once() -> None:
    entries = re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), flags=re.MULTILINE)
    assert len(entries) == len(set(entries))
    for module in (peft_jax, train):
        for name in set(public_names(module.__name__)) - {"interop"}:
            value = getattr(module, name)
            assert f"{value.__module__}.{value.__name__}" in entries, f"{name} is not in docs/reference/"


def test_each_page_is_in_the_navigation() -> None:
    nav = re.findall(r"^ .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["strict"] is True
    assert sorted(nav) == sorted("index.md" if page == README else page.removeprefix("docs/") for page in PAGES)


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    subprocess.run(["make", "links"], cwd=ROOT, check=True, capture_output=True)
    words = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert "LoRA on any JAX function." in home and 'src="repository/examples/demo-loss.png"' in home
    assert (tmp_path / "repository" / "examples" / "demo-loss.png").stat().st_size > 1000
    for file in tmp_path.glob("**/*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="?(https?://[^\s">]+)', file.read_text())
        assert fetched == [], f"{file.name} fetches from a network"
