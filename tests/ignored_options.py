"""Runs the test of each option with that option ignored, and expects it to fail: `make test-options`.

The command line is read as ever; then the option gets its default value back. One without a default gets another
value, and of one that is given several times the first value alone is left.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from peft_jax.cli import main as main_module
from peft_jax.cli.main import COMMANDS
from peft_jax.cli.shared.command_line import Parameter, option_groups

OTHER = "another"  # in place of a value that has no default


@contextlib.contextmanager
def ignored(command: str, option: str) -> Iterator[None]:
    """In the block a command line is read without what it says of an option."""
    parse = main_module.parse_command
    [parameter] = [one for _, group in option_groups(COMMANDS[command]) for one in group if one.name == option]

    def parse_without(kind: type[Any], name: str, words: Sequence[str]) -> Any:
        if name != command:
            return parse(kind, name, words)
        if option == "config":  # it is read with the other words
            return parse(kind, name, _without(words, parameter))
        return _with_default(parse(kind, name, words), parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_module, "parse_command", parse_without)
        yield


def _without(words: Sequence[str], parameter: Parameter) -> list[str]:
    found = list(words)
    while flags := set(parameter.flags) & set(found):
        place = found.index(flags.pop())
        del found[place : place + 2]
    return found


def _with_default(options: Any, parameter: Parameter) -> Any:
    """A copy in which one option is as if it were not given."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):  # a group of options, which may have the name of one
            if parameter.name in {one.name for one in dataclasses.fields(value)}:
                return dataclasses.replace(options, **{field.name: _with_default(value, parameter)})
        elif field.name == parameter.name:
            return dataclasses.replace(options, **{field.name: _default(field, value)})
    raise AssertionError(f"no option is named {parameter.name}")


def _default(field: dataclasses.Field[Any], value: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if isinstance(value, tuple):
        return value[:1] if len(value) > 1 else (OTHER,)
    return Path(OTHER) if isinstance(value, Path) else OTHER


class WithoutOption(pytest.Function):
    """A test that is expected to fail, as an option of a command is ignored."""

    command: str
    option: str

    def runtest(self) -> None:
        """Run the test, and fail if it passes."""
        try:
            with ignored(self.command, self.option):
                super().runtest()
        except (Exception, pytest.fail.Exception) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self.add_report_section("call", "failure", said)
            self.user_properties.append(("failure", said))
        else:
            pytest.fail(f"passes although {self.command} ignores {self.option}", pytrace=False)


def without_options(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that tests/test_each_option.py names; and for each option its test, as one that is expected to fail."""
    from test_each_option import CASES

    by_id = {item.nodeid.removeprefix("tests/"): item for item in items}
    as_they_are: dict[str, pytest.Item] = {}
    found: list[pytest.Item] = []
    for command, options in CASES.items():
        for option, name in options.items():
            item = by_id.get(name)
            if not isinstance(item, pytest.Function):
                raise pytest.UsageError(f"no test {name}, which is named for {option} of {command}")
            as_they_are[name] = item
            callspec = {"callspec": item.callspec} if hasattr(item, "callspec") else {}
            copy = WithoutOption.from_parent(
                item.parent,
                name=f"{item.name}-without-{command}-{option}",
                originalname=item.originalname,
                fixtureinfo=item._fixtureinfo,
                **callspec,
            )
            copy.command, copy.option = command, option
            found.append(copy)
    both = [*as_they_are.values(), *found]
    return sorted(both, key=lambda item: item.nodeid.partition("::")[0])  # the fixtures of a file are made once
