"""A command line from classes of options: words to values, help, and errors of one line.

A class of options is a dataclass. Its fields are the options, the docstrings below them are their help, and an `Option`
in ``Annotated`` gives what a type cannot say. A command has its options in fields of such classes, or inherits them;
each class is a group of the help, under its ``TITLE``.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from peft_jax.cli.shared.option_file import read_options

Command = TypeVar("Command")
METAVARS = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}
KINDS = {int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Option:
    """Properties of an option beside its type.

    Attributes:
        aliases: Other flags for it, as other programs call it.
        presets: Flags that stand for the option with a value.
        metavar: Name of its value in the help; by default its type.
        positional: Whether it is given without a flag.
        repeatable: Whether its flag takes one value and may be given several times.
        of_adapter: Whether it is a field of an adapter's config too, so that messages may mean either.
    """

    aliases: tuple[str, ...] = ()
    presets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metavar: str | None = None
    positional: bool = False
    repeatable: bool = False
    of_adapter: bool = False


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An option of a command, read from its field.

    Attributes:
        name: The field's name.
        type: Its type: bool, a type of `METAVARS`, or a tuple of such values.
        choices: The values it may have, if only some.
        optional: Whether it may be None.
        default: Its default; ``dataclasses.MISSING`` where it must be given.
        help: Its docstring in one line.
        option: What its annotation adds.
    """

    name: str
    type: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    option: Option

    @property
    def flags(self) -> list[str]:
        """The flags that take its value; none where it is positional."""
        return [] if self.option.positional else [flag(self.name), *self.option.aliases]

    @property
    def metavar(self) -> str:
        """Name of its value."""
        choices = f"{{{','.join(self.choices)}}}" if self.choices else None
        return self.option.metavar or choices or METAVARS.get(self.type, "NAME")

    @property
    def usage(self) -> str:
        """How it is given, in short."""
        return " ".join([*self.flags[:1], self.metavar])

    def value(self, words: str | list[str]) -> Any:
        """Convert what was typed.

        Raises:
            ValueError: If it is no value of this type.
        """
        if isinstance(words, list):
            return tuple(words)
        if self.optional and words == "None":  # as settings are written in a run's model card
            return None
        if self.choices and words not in self.choices:
            raise ValueError(f"{self.flags[0]} is '{words}'. Give one of {', '.join(self.choices)}.")
        try:
            return self.type(words)
        except ValueError as error:
            raise ValueError(f"{self.flags[0]} is '{words}'. Give {KINDS[self.type]}.") from error


def flag(name: str) -> str:
    """Return an option as it is typed.

    Example:
        >>> flag("max_steps")
        '--max-steps'
    """
    return f"--{name.replace('_', '-')}"


def parse_command(command: type[Command], name: str, words: Sequence[str]) -> Command:
    """Make a command's options from the words behind its name.

    Args:
        command: The class of its options.
        name: Its name.
        words: The words.

    Returns:
        The options. With ``--help`` among the words the help is printed and SystemExit raised instead.

    Raises:
        ValueError: If an option is unknown or missing, or a value is.
    """
    groups = option_groups(command, helped=not {"-h", "--help"}.isdisjoint(words))
    parameters = [parameter for _, group in groups for parameter in group]
    parser = _parser(command, name, groups)
    try:
        found, rest = parser.parse_known_args(_with_hyphens(words))
    except argparse.ArgumentError as error:
        raise ValueError(_misused(parameters, str(error.argument_name).split("/")[0])) from error
    typed = vars(found)
    _apply_presets(parameters, typed)
    if "config" in typed:
        typed = {**_from_file(Path(typed["config"]), parameters, name), **typed}
    for parameter in parameters:
        if parameter.option.positional and parameter.type is tuple and not any(word.startswith("-") for word in rest):
            typed[parameter.name] = [*typed.get(parameter.name, ()), *rest]  # words behind further options
            rest = []
    if rest:
        raise ValueError(_unknown(name, parameters, rest))
    missing = [parameter for parameter in parameters if parameter.name not in typed and _is_required(parameter)]
    if missing:
        usages = ", ".join(parameter.usage for parameter in missing)
        raise ValueError(f"{name} needs {usages}. peft-jax {name} --help says what that is.")
    values = {}
    for parameter in parameters:
        if parameter.name in typed:
            value = typed[parameter.name]
            values[parameter.name] = value if isinstance(value, bool) else parameter.value(value)
    return _construct(command, values)


def _from_file(file: Path, parameters: Sequence[Parameter], name: str) -> dict[str, Any]:
    """The options in a file, as if they had been typed: as words, lists of words, and booleans.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has what is no option, or a value that cannot be one.
    """
    by_flag = {flag: parameter for parameter in parameters for flag in parameter.flags}
    found: dict[str, Any] = {}
    for key, value in read_options(file).items():
        spelled = flag(key)
        parameter = by_flag.get(spelled)
        if parameter is None or parameter.name == "config":
            raise ValueError(f"{file} has {key}, which is no option of {name}.{nearest(spelled, list(by_flag))}")
        if parameter.name in found:
            raise ValueError(f"{file} has {parameter.name} by two names. Write it once.")
        if value is not None:
            found[parameter.name] = _words_of(value, parameter, f"{key} in {file}")
    return found


def _words_of(value: Any, parameter: Parameter, where: str) -> Any:
    """A value of a file as it would be typed."""
    if parameter.type is bool or isinstance(value, bool):
        if parameter.type is bool and isinstance(value, bool):
            return value
        wanted = "true or false" if parameter.type is bool else parameter.metavar
        raise ValueError(f"{where} is {json.dumps(value, default=str)}. Write {wanted}.")
    if parameter.type is tuple:
        parts = value if isinstance(value, list) else [value]
        return [str(part) for part in parts]
    if isinstance(value, dict) and parameter.option.metavar == "JSON":
        return json.dumps(value)
    if isinstance(value, list | dict):
        raise ValueError(f"{where} is {json.dumps(value, default=str)}. Write one value.")
    return str(value)


def with_flags(message: str, command: object) -> str:
    """A message of the library with its arguments as the command spells them.

    Names in quotes, and those with a value behind ``=``, are fields of files or Python's and stay.

    Args:
        message: The message.
        command: The options of the command that it is about.

    Example:
        >>> from peft_jax.cli.command_options import Eval
        >>> with_flags("Raise cutoff_len to 44; dtype='x' stays.", Eval(data="x.json"))
        "Raise --cutoff-len to 44; dtype='x' stays."
    """
    names = []
    for _, group in option_groups(type(command)):
        names += [parameter.name for parameter in group if "_" in parameter.name and not parameter.option.of_adapter]
    if not names:
        return message
    return re.sub(rf"(?<![\w'\".\-/])({'|'.join(names)})(?![\w='\".:/-])", lambda found: flag(found[1]), message)


def nearest(word: str, known: Sequence[str]) -> str:
    """A question for the known word that is nearest to a mistyped one; empty where none is near.

    Example:
        >>> nearest("--modle", ["--model", "--data"])
        ' Did you mean --model?'
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


def overview(description: str, commands: Mapping[str, type]) -> str:
    """The help of the program: its commands, each with the docstring of its options."""
    width = _width()
    indent = max(map(len, commands)) + 4
    lines = ["usage: peft-jax COMMAND [OPTIONS]", "", description, "", "Commands:"]
    for name, command in commands.items():
        lines += _wrapped(_prose(command.__doc__), width, first=f"  {name}".ljust(indent), rest=" " * indent)
    lines += ["", "peft-jax COMMAND --help lists the options of a command.", ""]
    statuses = (
        "Exit statuses: 0 done, 1 a defect of the program, 2 an error that the line on stderr says, 130 stopped by "
        "Ctrl-C, 141 the output's reader is gone. With --debug, an error keeps its traceback."
    )
    lines += _wrapped(statuses, width, first="", rest="")
    return "\n".join(lines)


def option_groups(command: type, *, helped: bool = True) -> list[tuple[str, list[Parameter]]]:
    """The options of a command by title, in the order of the help.

    Those of a class without a title are in the group of the class that inherits them.

    Args:
        command: The class of its options.
        helped: Whether they have their help, which takes longer than all else, as the sources are read.
    """
    groups = []
    waiting: list[Parameter] = []
    for owner in _owners(command):
        own = inspect.get_annotations(owner)
        docs = _attribute_docs(owner) if helped else {}
        fields = [field for field in dataclasses.fields(owner) if field.name in own]
        parameters = [_parameter(field, docs.get(field.name, "")) for field in fields]
        if _is_part(owner, command):
            waiting += parameters
        else:
            groups.append((str(vars(owner).get("TITLE", "Options")), waiting + parameters))
            waiting = []
    return groups


def _is_part(owner: type, command: type) -> bool:
    """Whether a class of options is shown with those of a class that inherits them."""
    return owner is not command and "TITLE" not in vars(owner)


def _owners(command: type) -> Iterator[type]:
    """The classes whose fields are options: of a command's fields, or those it inherits from and itself."""
    parts = [field.type for field in dataclasses.fields(command) if dataclasses.is_dataclass(field.type)]
    if parts:
        for part in parts:
            assert isinstance(part, type)
            yield from (owner for owner in (*part.__mro__[1:], part) if dataclasses.is_dataclass(owner))
    else:
        yield from (owner for owner in (*command.__mro__[1:], command) if dataclasses.is_dataclass(owner))


def _parameter(field: dataclasses.Field[Any], help: str) -> Parameter:
    annotation, option = field.type, Option()
    if get_origin(annotation) is Annotated:
        annotation, option = get_args(annotation)
    optional = get_origin(annotation) in (Union, UnionType)
    if optional:
        (annotation,) = [part for part in get_args(annotation) if part is not NoneType]
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    kind = str if choices else get_origin(annotation) or annotation
    assert isinstance(kind, type)
    return Parameter(field.name, kind, choices, optional, field.default, help, option)


def _attribute_docs(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = _prose(str(below.value.value))
    return docs


def _parser(command: type, name: str, groups: Sequence[tuple[str, Sequence[Parameter]]]) -> argparse.ArgumentParser:
    parameters = [parameter for _, group in groups for parameter in group]
    usages = [parameter.usage for parameter in parameters if _is_required(parameter)]
    usages += ["[OPTIONS]", *(f"[{p.metavar} ...]" for p in parameters if p.option.positional and p.type is tuple)]
    parser = argparse.ArgumentParser(
        prog=f"peft-jax {name}",
        usage=" ".join(["peft-jax", name, *usages]),
        description=_prose(command.__doc__),
        formatter_class=HelpPage,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    for title, members in groups:
        group = parser.add_argument_group(title)
        for parameter in members:
            group.add_argument(*(parameter.flags or [parameter.name]), **_settings(parameter))
            for preset, value in parameter.option.presets.items():
                help = f"Short for {parameter.flags[0]} {value}."
                group.add_argument(preset, dest=preset, action="store_const", const=value, help=help)
    parser.add_argument_group("Help").add_argument("-h", "--help", action="help", help="Print this page.")
    return parser


def _settings(parameter: Parameter) -> dict[str, Any]:
    """How argparse takes an option: as the words that were typed, which are converted afterwards."""
    text = parameter.help
    if _is_required(parameter):
        text = f"{text} (required)"
    elif isinstance(parameter.default, (int, float, str, Path)) and parameter.type is not bool:
        text = f"{text} (default: {parameter.default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%")}
    if parameter.type is bool:
        return {**settings, "action": "store_true"}
    settings["metavar"] = parameter.metavar
    if parameter.option.repeatable:
        settings["action"] = "append"
    elif parameter.type is tuple:
        settings["nargs"] = "*" if parameter.option.positional else "+"
    elif parameter.option.positional:
        settings["nargs"] = "?"  # its absence is reported with that of the other options
    return settings


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is dataclasses.MISSING


def _with_hyphens(words: Sequence[str]) -> list[str]:
    """Flags such as ``--target_modules=x``, as other programs spell them, with hyphens; what follows ``--`` is none."""
    flags = list(words)
    for number, word in enumerate(flags):
        if word == "--":
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            flags[number] = f"{name.replace('_', '-')}{equals}{value}"
    return flags


def _apply_presets(parameters: Sequence[Parameter], typed: dict[str, Any]) -> None:
    """Give options the values of the flags that stand for them.

    Raises:
        ValueError: If several values are given for one option.
    """
    for parameter in parameters:
        for preset, value in parameter.option.presets.items():
            if preset not in typed:
                continue
            if typed.setdefault(parameter.name, value) != value:
                other = f"{parameter.flags[0]} {typed[parameter.name]}"
                raise ValueError(f"{preset} and {other} contradict each other. Give one of them.")


def _misused(parameters: Sequence[Parameter], typed: str) -> str:
    """Say what is wrong with a flag whose value is missing, or that has one although it takes none."""
    for parameter in parameters:
        if typed in parameter.flags and parameter.type is not bool:
            return f"{typed} has no value. Give {parameter.metavar} behind it."
    return f"{typed} takes no value. Give the flag alone, or leave it out."


def _unknown(name: str, parameters: Sequence[Parameter], rest: Sequence[str]) -> str:
    """Say which word belongs to no option."""
    known = ["--help"]
    for parameter in parameters:
        known += [*parameter.flags, *parameter.option.presets]
    everything = f"peft-jax {name} --help lists all options."
    for word in rest:
        if word.startswith("-"):
            typed = word.partition("=")[0]
            return f"{name} has no option {typed}.{nearest(typed, known)} {everything}"
    return f"'{rest[0]}' belongs to no option of {name}. {everything}"


def _construct(command: type[Command], values: Mapping[str, Any]) -> Command:
    """Make a command's options, or those of its parts."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(command):  # type: ignore[arg-type]  # a dataclass
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            arguments[field.name] = _construct(field.type, values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return command(**arguments)


class HelpPage(argparse.HelpFormatter):
    """Help whose paragraphs are not broken inside flags, and that names an option's value once."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"width": _width(), "max_help_position": 26, **settings})

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_wrapped(text, width, first=indent, rest=indent))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return f"{action.metavar} ..." if action.nargs == "*" else str(action.metavar)
        flags = ", ".join(action.option_strings)
        if action.nargs == 0:
            return flags
        more = f" [{action.metavar} ...]" if action.nargs == "+" else ""
        return f"{flags} {action.metavar}{more}"


def _width() -> int:
    return shutil.get_terminal_size().columns - 2


def _wrapped(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _prose(docstring: str | None) -> str:
    return " ".join((docstring or "").split())
