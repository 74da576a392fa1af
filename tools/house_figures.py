"""Measure the inside of the package: sizes, density, annotations, and the functions that two public calls run through.

    python tools/house_figures.py             # this package, as a table
    python tools/house_figures.py FOLDER ...  # other packages beside it, for comparison (their sizes and density)

Tests and ``__init__`` files are left out. A figure is counted as follows.

- Files and functions by the lines from their first to their last, docstrings and blank lines included.
- A function is fully annotated if its return value and all its parameters but ``self`` and ``cls`` are.
- ``Any`` alone: annotations of parameters, return values and fields that are nothing but ``Any``.
- Comprehensions (generator expressions too) and conditional expressions for each 1000 lines of the files.
- Comments for each 100 lines that hold code. Lines of directives, such as ``# type: ignore``, are no comments.
- A walk: how many functions of ours, in how many files, one call runs through. Functions inside functions count, and
  so do comprehensions where Python runs them as functions of their own (before 3.12).
"""

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DIRECTIVE = re.compile(r"#\s*(type:|noqa|pragma:|fmt:|ruff:|!)")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Figures(NamedTuple):
    """Counts over some files."""

    files: list[int]
    functions: list[int]
    annotated: int
    annotations: int
    any_alone: int
    comprehensions: int
    conditionals: int
    comments: int
    code_lines: int


def is_counted(file: Path) -> bool:
    """Whether a file is neither a test nor an ``__init__``."""
    parts = {*file.parts, file.stem}
    is_test = file.stem.startswith("test_") or file.stem.endswith("_test") or bool(parts & {"tests", "test", "testing"})
    return file.name != "__init__.py" and not is_test


def parameters(function: Function) -> list[ast.arg]:
    """All parameters of a function but ``self`` and ``cls``."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    every += [one for one in (given.vararg, given.kwarg) if one is not None]
    return [one for one in every if one.arg not in ("self", "cls")]


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """Annotations of parameters, return values and fields."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            for parameter in parameters(node):
                if parameter.annotation is not None:
                    yield parameter.annotation
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def is_fully_annotated(function: Function) -> bool:
    """Whether all parameters and the return value have annotations."""
    return function.returns is not None and all(one.annotation is not None for one in parameters(function))


def count_comments(source: str) -> tuple[int, int]:
    """Number of comments, and of lines that hold code."""
    comments, code = 0, set[int]()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and starts_statement
        if token.type == tokenize.COMMENT and not DIRECTIVE.match(token.string):
            comments += 1
        elif token.type not in layout and not is_docstring:
            code.update(range(token.start[0], token.end[0] + 1))
        starts_statement = token.type in layout
    return comments, len(code)


def measure(files: Sequence[Path]) -> Figures:
    """The figures of some files together."""
    lengths, functions = [], []
    annotated = every = any_alone = comprehensions = conditionals = comments = code_lines = 0
    for file in files:
        source = file.read_text()
        tree = ast.parse(source)
        lengths.append(len(source.splitlines()))
        for node in ast.walk(tree):
            if isinstance(node, Function):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
                annotated += is_fully_annotated(node)
            comprehensions += isinstance(node, COMPREHENSIONS)
            conditionals += isinstance(node, ast.IfExp)
        for annotation in annotations(tree):
            every += 1
            any_alone += isinstance(annotation, ast.Name) and annotation.id == "Any"
        found, lines = count_comments(source)
        comments += found
        code_lines += lines
    return Figures(lengths, functions, annotated, every, any_alone, comprehensions, conditionals, comments, code_lines)


def spread(values: Sequence[int], share: float) -> str:
    """Median, a higher quantile and the maximum."""
    ordered = sorted(values)
    position = min(int(share * len(ordered)), len(ordered) - 1)
    return f"{statistics.median(ordered):.0f} / {ordered[position]} / {ordered[-1]}"


def rows(figures: Figures) -> list[tuple[str, str]]:
    """The table's rows for one package: name and figure."""
    thousands, hundreds = sum(figures.files) / 1000, figures.code_lines / 100
    return [
        ("files", str(len(figures.files))),
        ("file lines, median / p90 / max", spread(figures.files, 0.9)),
        ("function lines, median / p95 / max", spread(figures.functions, 0.95)),
        ("fully annotated functions", f"{figures.annotated / len(figures.functions):.0%}"),
        ("annotations that are Any alone", f"{figures.any_alone / max(figures.annotations, 1):.1%}"),
        ("comprehensions per 1000 file lines", f"{figures.comprehensions / thousands:.1f}"),
        ("conditional expressions per 1000 file lines", f"{figures.conditionals / thousands:.1f}"),
        ("comments per 100 code lines", f"{figures.comments / hundreds:.1f}"),
    ]


def walk(call: Callable[[], Any]) -> tuple[int, int]:
    """How many functions of the package, in how many of its files, a call runs through."""
    seen = set[CodeType]()
    inside = tuple(str(folder) for folder in (ROOT / "peft_jax", ROOT / "interop"))

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(inside):
            seen.add(code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(seen), len({code.co_filename for code in seen})


def walks() -> list[tuple[str, str]]:
    """The two walks: attaching LoRA to a tree of one leaf, and loading the same adapter from its file."""
    import tempfile

    import jax.numpy as jnp

    import peft_jax as pj

    params = {"q": {"kernel": jnp.ones((4, 8))}}
    config = pj.LoraConfig(r=2, target_modules=["q"])
    with tempfile.TemporaryDirectory() as folder:
        pj.interop.save_adapter(pj.apply_lora(params, config), folder)  # what runs once, such as imports, has run
        pj.interop.load_adapter(params, folder)
        attached = walk(lambda: pj.apply_lora(params, config))
        loaded = walk(lambda: pj.interop.load_adapter(params, folder))
    return [
        ("apply_lora on one leaf", "{} functions in {} files".format(*attached)),
        ("load_adapter on one leaf", "{} functions in {} files".format(*loaded)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="other packages to measure beside this one")
    folders = parser.parse_args().folders
    ours = [*sorted((ROOT / "peft_jax").rglob("*.py")), *sorted((ROOT / "interop").rglob("*.py"))]
    packages = {"peft_jax": ours}
    for folder in sorted((ROOT / "peft_jax").iterdir()):
        if (folder / "__init__.py").exists():
            packages[f"peft_jax/{folder.name}"] = sorted(folder.rglob("*.py"))
    packages["interop"] = sorted((ROOT / "interop").rglob("*.py"))
    for folder in folders:
        packages[folder.name] = sorted(folder.rglob("*.py"))
    for name, files in packages.items():
        counted = [file for file in files if is_counted(file.relative_to(file.parents[-1]))]
        if not counted:
            continue
        print(name)
        for row, figure in rows(measure(counted)):
            print(f"  {row:<46}{figure}")
    print("walks")
    for row, figure in walks():
        print(f"  {row:<46}{figure}")


if __name__ == "__main__":
    main()
