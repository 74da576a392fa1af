"""The house's own rules: which way imports point, what is never imported, what the public face holds."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import peft_jax
from peft_jax.models.registry import BY_MODEL_TYPE, FAMILIES

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
    """But for one function, which does without PyTorch where it is not installed."""
    assert not {"torch", "peft"} & {name.split(".")[0] for name in imported_names(file)}
    by_name = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec", "__import__")):
            by_name += [str(name.value).split(".")[0] for name in node.args if isinstance(name, ast.Constant)]
    asks = str(file.relative_to(ROOT)) == "peft_jax/methods/principal_vectors.py"
    assert [name for name in by_name if name in ("torch", "peft")] == ["torch"] * asks


def test_every_package_is_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {".".join(module_name(file)) for file in FILES if file.name == "__init__.py"}
    assert {package.split(".")[1] for package in packages if "." in package} <= set(ROOMS)
    for package in packages:
        assert importlib.util.find_spec(package) is not None
    assert (ROOT / "peft_jax" / "py.typed").exists()
    for file in FILES:
        assert (file.parent / "__init__.py").exists(), f"a wheel would lack {file}"
    setuptools = pytest.importorskip("setuptools", reason="newer Pythons have it in the building environment alone")
    given: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    assert sorted(packages) == sorted(given["packages"]), (
        "an editable installation finds them, a wheel has those listed"
    )


def imports_at_run_time(tree: ast.AST, *, at_once: bool) -> Iterator[str]:
    """The outermost packages that a program imports; at once: those outside of functions. Type checkers' are not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module and not node.level:
                yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports_at_run_time(node, at_once=at_once)


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "where needed"])
def test_what_is_imported_is_declared(at_once: bool) -> None:
    """A plain installation has what is imported at once; what a function imports may be an extra's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = list(project["dependencies"])
    if not at_once:
        for extra in ("tensorboard", "datasets", "gguf"):
            listed += project["optional-dependencies"][extra]
    declared = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in listed}
    modules = {{"orbax_checkpoint": "orbax", "pyyaml": "yaml"}.get(name, name) for name in declared}
    for file in FILES:
        found = set(imports_at_run_time(ast.parse(file.read_text()), at_once=at_once))
        missing = found - {"peft_jax"} - set(sys.stdlib_module_names) - modules
        assert not missing, f"{file} imports {sorted(missing)}: pyproject.toml does not declare them"


def test_adapted_leaves_have_one_builder() -> None:
    """A leaf with rows of adapters is not built: it asks what each of them would be alone."""
    allowed = {"peft_jax/adapters/build.py", "peft_jax/adapters/per_row.py", "peft_jax/core/adapted.py"}
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        builds = any(isinstance(call.func, ast.Name) and call.func.id == "Adapted" for call in calls)
        assert not builds or str(file.relative_to(ROOT)) in allowed, f"{file} builds an adapted leaf by itself"


@pytest.mark.parametrize(
    "file", [file for file in FILES if module_name(file)[:2] == ["peft_jax", "methods"]], ids=lambda file: file.stem
)
def test_methods_see_one_leaf(file: Path) -> None:
    """Operations on trees are in adapters/: a method knows the arrays of its leaves, not where the leaves are."""
    of_trees = (
        "peft_jax.core.leaves",
        "peft_jax.core.adapted_tree.map_adapted",
        "peft_jax.core.adapted_tree.adapted_leaves",
    )
    assert not [name for name in imported_names(file) if name.startswith(of_trees)]


def house_figures() -> ModuleType:
    """The script that measures the package."""
    file = ROOT / "tools" / "house_figures.py"
    location = importlib.util.spec_from_file_location("house_figures", file)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


FIGURES = house_figures()
COMPREHENSIONS = FIGURES.COMPREHENSIONS
DENSEST = 20  # comprehensions, and conditional expressions, for each 1000 lines of files


def expressions_of(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of one statement, inner ones too; those of statements in its body are theirs."""
    waiting = list(ast.iter_child_nodes(statement))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            continue
        if isinstance(node, ast.expr):
            yield node
        waiting += ast.iter_child_nodes(node)


def crowded_statements(source: str) -> list[int]:
    """Lines of statements with more than one comprehension or with a conditional expression in another one."""
    found = []
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.stmt):
            continue
        expressions = list(expressions_of(statement))
        comprehensions = sum(isinstance(one, COMPREHENSIONS) for one in expressions)
        conditionals = [one for one in expressions if isinstance(one, ast.IfExp)]
        inner = [node for outer in conditionals for node in ast.walk(outer) if node is not outer]
        if comprehensions > 1 or any(isinstance(node, ast.IfExp) for node in inner):
            found.append(statement.lineno)
    return found


@pytest.mark.parametrize(
    "line", ["y = [[a for a in b] for b in c]", "y = 1 if a else 2 if b else 3", "f(*(a for a in b), {c for c in d})"]
)
def test_a_crowded_statement_is_seen(line: str) -> None:
    assert crowded_statements(f"if x:\n    {line}") == [2]
    assert not crowded_statements(
        "for a in [b for b in c]:\n    d = [e for e in a]\n    f = 1 if a else 2\n    g = 1 if b else 2"
    )


@pytest.mark.parametrize("room", ["core", "adapt"])
def test_statements_are_plain(room: str) -> None:
    """Statement by statement: at most one comprehension, and no conditional expression in another one."""
    files = [file for file in FILES if module_name(file)[:2] == ["peft_jax", room]]
    assert len(files) > 5
    for file in files:
        lines = crowded_statements(file.read_text())
        assert not lines, f"{file.relative_to(ROOT)}: give the parts of the statements in lines {lines} names"


def test_density_is_that_of_plain_code() -> None:
    """As `tools/house_figures.py` counts over the whole package, docstrings and blank lines included."""
    figures = FIGURES.measure([file for file in FILES if FIGURES.is_counted(file.relative_to(ROOT))])
    thousands = sum(figures.files) / 1000
    assert thousands > 30
    for name in ("comprehensions", "conditionals"):
        found = getattr(figures, name) / thousands
        assert found < DENSEST, f"{found:.1f} {name} for each 1000 lines: write the crowded statements as plain ones"


def nested_comprehensions(source: str) -> list[int]:
    """Lines of comprehensions inside comprehensions."""
    found = []
    for outer in ast.walk(ast.parse(source)):
        if isinstance(outer, COMPREHENSIONS):
            inside = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS) and node is not outer]
            found += [node.lineno for node in inside]
    return found


def test_a_nested_comprehension_is_seen() -> None:
    assert nested_comprehensions("y = 1\nx = {a for a in [b for b in c]}") == [2]
    assert not nested_comprehensions("x = [a for a in b for b in c]\ny = f(a for a in b), [a for a in b]")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_comprehensions_are_not_nested(file: Path) -> None:
    lines = nested_comprehensions(file.read_text())
    assert not lines, f"{file.relative_to(ROOT)}: write one of the comprehensions in lines {lines} as a loop"


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_docstring_opens_with_a_sentence(file: Path) -> None:
    """A verb or a noun, never "What ..."."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, DOCUMENTED)]
    riddles = [node for node in nodes if (ast.get_docstring(node) or "").startswith("What ")]
    assert not riddles, [ast.get_docstring(node) for node in riddles]


def test_no_two_modules_share_a_basename() -> None:
    """A reader who has an open file called `plan.py` knows which one it is."""
    shared = {"__init__", "base", "config", "model", "family", "registry"}
    commands = {
        "merge",
        "evaluate",
        "demo",
        "finetune",
        "generate",
        "inspect",
        "preview",
    }  # named in cli/ as they are typed
    seen: dict[str, Path] = {}
    for file in FILES:
        is_command = file.stem in commands and module_name(file)[1] == "cli"
        if file.stem not in shared and not is_command:
            other = seen.setdefault(file.stem, file)
            assert other == file, f"{other} and {file} share a name"


FOLDERS = {name: family.config.__module__.split(".")[2] for name, family in BY_MODEL_TYPE.items()}
# Code outside an architecture's folder and the registry that names it nevertheless, and why.
NAMING = {
    "peft_jax/models/__init__.py": "the public face: the configs that a user makes models from",
    "peft_jax/prompts/gguf_tokenizer.py": "the word that GGUF files have for SentencePiece",
    "peft_jax/models/ministral/config.py": "a field of its configs in transformers is named after another model",
    "peft_jax/cli/demo.py": "says what the checkpoint is that ships with the package",
}
ABBREVIATIONS = ("opt",)  # which other words of code begin with: opt_state, OPTIONS
# Code outside the folders that has names of modules which an architecture has too, and why.
LISTING = {
    "peft_jax/core/targets.py": "PEFT's list of the heads that it trains whole, for all models",
    "peft_jax/adapters/kappa.py": "PEFT's ends of the names of fused experts",
    "peft_jax/adapters/target_parameters.py": "the names that all experts of transformers give their parameters",
    "peft_jax/models/registry.py": "the folders of architectures, one of which has a module of its name",
    "peft_jax/models/decoder_config.py": "the heads that most decoders have",
    "peft_jax/models/shadow_backbone.py": "the one name of a table of tokens that PEFT looks for in a small network",
    "peft_jax/models/modules/layers.py": "the class LayerNorm itself",
    "peft_jax/models/modules/plain_blocks.py": "the fused attention that several decoders share",
    "peft_jax/models/modules/decoder_blocks.py": "the attention and the feed-forward network that most decoders share",
    "peft_jax/models/modules/mixture.py": "the experts, and the layer around them, that several mixtures share",
    "peft_jax/models/expert_names.py": "the names of experts in the checkpoints of most mixtures",
    "peft_jax/adapters/attach.py": "PEFT's name for the input embedding of what is no model of transformers'",
    "interop/formats.py": "PEFT's list of the modules whose base weight a file holds too",
    "peft_jax/cli/inspect/servers.py": "the list in a server's own code of the modules that it takes adapters of",
    "peft_jax/cli/finetune/adapter_config.py": "an example of what a user may type",
}


def words_of(file: Path, *, with_docstrings: bool) -> str:
    """The strings and names in a file's code, a line each; of docstrings what is no example."""
    tree = ast.parse(file.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                found.append(node.value)
            elif with_docstrings:
                found += [line for line in node.value.splitlines() if not line.strip().startswith((">>>", "..."))]
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(name := getattr(node, field, None), str):
                found.append(name)
    return "\n".join(found)


def architectures_named(text: str) -> set[str]:
    """The model types whose names, or names of classes, are words of a text: `LlamaConfig`, `GPT-2`, `t5`."""
    found: list[tuple[int, int, str]] = []
    for family in FAMILIES:
        for model_type, stem in family.config.stems.items():
            for name in (model_type, stem):
                spelled = re.sub(r"(?<=[a-z])(?=\d)", "[-_ ]?", name.lower())
                pattern = rf"(?<![A-Za-z0-9])(?i:{spelled})(?![a-z0-9]|[._][0-9])"
                if model_type in ABBREVIATIONS:  # alone, or at the beginning of the name of a class
                    pattern = rf"(?m)^{model_type}$|(?<![A-Za-z0-9]){stem}(?![a-z0-9]|[A-Z](?![a-z]))"
                found += [(*match.span(), model_type) for match in re.finditer(pattern, text)]
    ends: dict[int, int] = {}  # of the longest name that starts there: qwen2_moe names no qwen2
    for start, end, _ in found:
        ends[start] = max(ends.get(start, 0), end)
    return {model_type for start, end, model_type in found if end == ends[start]}


def folder_of(file: Path) -> str:
    """The name of the architecture's folder that a file is in; empty if it is in none."""
    parts = file.relative_to(ROOT).parts
    return parts[2] if parts[:2] == ("peft_jax", "models") and parts[2] in FOLDERS.values() else ""


def test_names_of_architectures_are_found() -> None:
    """The check below sees the spellings that code has."""
    for text, model_type in {
        "LlamaConfig": "llama",
        "LLAMAS": "llama",
        "GPT-2": "gpt2",
        "gpt2.model": "gpt2",
        "XLM-RoBERTa": "xlm-roberta",
        "T5Config": "t5",
        "is_t5": "t5",
        "Qwen 3": "qwen3",
        "OPTConfig": "opt",
        "OPT, and others": "opt",
        "opt": "opt",
        "is_qwen3_5": "qwen3_5",
    }.items():
        assert model_type in architectures_named(text), text
    assert architectures_named("qwen2_moe Qwen2MoeConfig") == {"qwen2_moe"}
    assert architectures_named("llama3 test5 at5 t51 opt_state OPTIONS") == set(), (
        "a kind of rotary scaling, and other words"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_architecture_is_named_in_its_folder_and_the_registry_alone(file: Path) -> None:
    """Help texts and docstrings of what a user calls name none either; elsewhere docstrings may give examples."""
    path = str(file.relative_to(ROOT))
    called = path.startswith(("peft_jax/models/handles/", "peft_jax/cli/", "interop/"))
    named = architectures_named(words_of(file, with_docstrings=called))
    if path in NAMING:
        assert named, f"{path} names no architecture: take it off the list"
    elif path != "peft_jax/models/registry.py":
        assert {name for name in named if FOLDERS[name] != folder_of(file)} == set()


def test_the_page_of_models_names_every_architecture() -> None:
    """Help texts point to the page, and so does the README's table."""
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| Models |")]
    assert "](docs/models.md)" in row
    assert architectures_named((ROOT / "docs" / "models.md").read_text()) == set(BY_MODEL_TYPE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_of_an_architecture_are_named_in_its_folder_alone(file: Path) -> None:
    path, words = str(file.relative_to(ROOT)), words_of(file, with_docstrings=False)
    used = {name for name in module_names() if re.search(rf"(?<!\w){name}(?!\w)", words)}
    if path in LISTING:
        assert used, f"{path} names no module of an architecture: take it off the list"
    else:
        assert folder_of(file) or used == set()


@functools.cache
def module_names() -> set[str]:
    """The names of modules of all architectures, for all tasks, that are no common words."""
    paths: set[str] = set()
    for family in FAMILIES:
        for task in family.config.tasks:
            config = family.config(model_type=next(iter(family.config.stems)), task_type=task)
            paths |= family.param_shapes(config).keys()
    parts = {part for path in paths for part in path.split(".")[:-1]}
    return {part for part in parts if len(part) > 2 and ("_" in part or not part[1:].islower())}


@pytest.mark.parametrize("file", [file for file in FILES if "models" in file.parts], ids=lambda file: file.stem)
def test_architectures_do_not_import_one_another(file: Path) -> None:
    """Nor do the modules that they share import any of them: an architecture's folder can be removed."""
    if folder_of(file) or "modules" in file.parts:
        prefix = "peft_jax.models."
        imported = {name.removeprefix(prefix).split(".")[0] for name in imported_names(file) if name.startswith(prefix)}
        assert imported & set(FOLDERS.values()) <= {folder_of(file)}


@pytest.mark.parametrize("name", peft_jax.__all__)
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
    listed = []
    for name in imported_names(ROOT / "peft_jax" / "__init__.py"):
        if name == "peft_jax.methods.*":
            listed += [one.rpartition(".")[2] for one in imported_names(ROOT / "peft_jax" / "methods" / "__init__.py")]
        elif name.startswith("peft_jax.") and name != "peft_jax.core.lazy_names.import_lazily":
            listed.append(name.rpartition(".")[2])
    assert len(listed) > 70
    command = [sys.executable, "-c", PUBLIC_NAMES, *listed]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def patched_names(file: Path) -> Iterator[str]:
    """What a file of tests replaces by `setattr`: names with dots, or attributes."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda file: file.name)
def test_no_test_patches_a_private_name(file: Path) -> None:
    for name in patched_names(file):
        last = name.rpartition(".")[2]
        assert not last.startswith("_") or last.startswith("__"), f"{file.name} patches {name}"
