"""Reads the docstrings, signatures and documentation of the running CPython, as text to train on.

Everything comes from files that an installed CPython carries (PSF-2.0): the sources of its standard library, parsed and
never imported, and `pydoc_data.topics`, the language reference as `help()` shows it.
"""

import ast
import dataclasses
import functools
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip", "encodings", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method of the standard library.

    Attributes:
        module: Dotted name of its module.
        name: Its own name.
        signature: Name and parameters without annotations, `self` and `cls`, as in `shuffle(x, random=None)`.
        parameters: Its parameters as one writes them in a call, as in `("x", "*args")`.
        defaults: The parameters that have a default, with its source text.
        doc: Its docstring, or an empty string.
    """

    module: str
    name: str
    signature: str
    parameters: tuple[str, ...]
    defaults: dict[str, str]
    doc: str

    @property
    def call(self) -> str:
        """A call that passes every parameter by its own name."""
        return f"{self.name}({', '.join(self.parameters)})"


def is_held_out(name: str) -> bool:
    """Tell whether everything called `name` is kept for evaluation: one name in ten, always the same ones."""
    return zlib.crc32(name.encode()) % 10 == 0


def parsed_modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name and the syntax tree of each module of the standard library, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(path.parts):
            yield ".".join(path.with_suffix("").parts).removesuffix(".__init__"), ast.parse(file.read_bytes())


def describe(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    """Read one function's signature and docstring off its syntax tree."""
    args = node.args
    positional = args.posonlyargs if args.posonlyargs else args.args
    all_have_defaults = len(args.defaults) == len(args.posonlyargs + args.args)
    if positional and positional[0].arg in ("self", "cls") and not all_have_defaults:
        del positional[0]
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    plain = [arg.arg for arg in args.posonlyargs + args.args]
    keyword = [arg.arg for arg in args.kwonlyargs]
    defaults = dict(zip(plain[len(plain) - len(args.defaults) :], map(ast.unparse, args.defaults), strict=True))
    defaults |= {name: ast.unparse(d) for name, d in zip(keyword, args.kw_defaults, strict=True) if d is not None}
    starred = [f"*{args.vararg.arg}"] if args.vararg else []
    parameters = plain + starred + [f"{name}={name}" for name in keyword]
    parameters += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return Function(
        module=module,
        name=node.name,
        signature=f"{node.name}({ast.unparse(args)})",
        parameters=tuple(parameters),
        defaults=defaults,
        doc=ast.get_docstring(node) or "",
    )


@functools.cache
def functions() -> tuple[Function, ...]:
    """Return every function and method of the standard library, in the order of the sources."""
    return tuple(
        describe(module, node)
        for module, tree in parsed_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def indent(text: str) -> str:
    """Indent the lines of a docstring by four spaces."""
    return "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())


def function_page(function: Function, style: int) -> str:
    """Write a function's documentation in one of three styles: as source, as `help()` does, as a reference card."""
    if style == 0:
        doc = f'    """{indent(function.doc).strip()}"""\n' if function.doc else "    ...\n"
        return f"def {function.signature}:\n{doc}"
    if style == 1:
        heading = f"Help on function {function.name} in module {function.module}:\n\n"
        return heading + f"{function.signature}\n{indent(function.doc)}"
    defaults = "".join(f"{name} defaults to {value}\n" for name, value in function.defaults.items())
    return (
        f"Signature\n{function.signature}\n\nName\n{function.name}\n\nParameters\n{', '.join(function.parameters)}\n\n"
        f"Defaults\n{defaults}\nUsage\n{function.call}\n\nDescription\n{function.doc}\n"
    )


def class_or_module_page(module: str, node: ast.Module | ast.ClassDef) -> str:
    """Write the docstring of a module or class and the signatures of what it holds, save those kept for evaluation."""
    title = f"module {module}" if isinstance(node, ast.Module) else f"class {node.name} in module {module}"
    held = [child for child in node.body if isinstance(child, ast.FunctionDef) and not is_held_out(child.name)]
    names = ", ".join(child.name for child in held)
    signatures = "".join(f"    {describe(module, child).signature}\n" for child in held)
    return f"{title}\n\n{ast.get_docstring(node) or ''}\n\nFunctions: {names}\n{signatures}"


@functools.cache
def module_pages() -> tuple[str, ...]:
    """Return a page for each module, class and topic of the language reference."""
    pages = [f"{title}\n\n{text}" for title, text in sorted(topics.items())]
    pages += [
        class_or_module_page(module, node)
        for module, tree in parsed_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef)
    ]
    return tuple(page for page in pages if len(page) > 100)


def training_pages(seed: int) -> list[str]:
    """Return all pages to pretrain on in random order, each function's page in a random style.

    Functions without parameters and docstring are left out, and those without docstring are shown as cards alone.
    """
    rng = random.Random(seed)
    pages = list(module_pages())
    for function in functions():
        if (function.doc or function.parameters) and not is_held_out(function.name):
            pages.append(function_page(function, rng.randrange(3) if function.doc else 2))
    rng.shuffle(pages)
    return pages


def held_out_pages() -> list[str]:
    """Return the documented functions whose names are kept for evaluation, as source text."""
    return [function_page(f, 0) for f in functions() if is_held_out(f.name) and f.doc]
