"""Regular expressions of users: one line where they are wrong, and matches whose time is bounded.

Python's matcher backtracks, so that ``(a+)+b`` takes minutes on a name of thirty letters. Expressions that could do so
are matched by sets of positions, in time that is polynomial in the name.
"""

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

QUICK = 3  # repetitions and choices beside each other that Python's matcher may try all ways to share a name among
Positions = frozenset[int]
parser: Any = importlib.import_module("re._parser")


def compiled(pattern: str, field: str) -> re.Pattern[str]:
    """A regular expression, compiled.

    Args:
        pattern: The expression.
        field: What it is, for the message.

    Raises:
        ValueError: if it is none.

    Example:
        >>> compiled(".*q_proj", "target_modules").fullmatch("layers.0.q_proj") is not None
        True
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        glob = " A glob is none: write '.*' for its '*'." if "*" in pattern else ""
        raise ValueError(f"{field}={pattern!r} is no regular expression: {error}.{glob}") from None


@functools.lru_cache(maxsize=1 << 16)
def matches(pattern: str, text: str) -> bool:
    r"""Whether a regular expression matches the whole of a text, in bounded time.

    Raises:
        ValueError: if it is none, or it may take forever and refers back to a group, which has no bounded way.

    Example:
        >>> matches(r".*\.(q|v)_proj", "layers.0.q_proj"), matches("(a+)+b", "a" * 40)
        (True, False)
    """
    quick = compiled(pattern, "pattern")
    if is_quick(pattern):
        return quick.fullmatch(text) is not None
    return len(text) in _ends(_parsed(pattern), text, frozenset([0]), bool(quick.flags & re.IGNORECASE))


@functools.lru_cache(maxsize=1 << 10)
def is_quick(pattern: str) -> bool:
    r"""Whether backtracking cannot take long: nothing to choose in a repetition, and few of them beside each other.

    Example:
        >>> is_quick(r".*\.\d+\.q_proj"), is_quick("(a+)+b")
        (True, False)
    """
    return _repetitions(_parsed(pattern)) <= QUICK


@functools.lru_cache(maxsize=1 << 6)
def _parsed(pattern: str) -> Any:
    return parser.parse(pattern)


def _repetitions(items: Iterable[Any]) -> float:
    """How many repetitions of a variable length and choices there are, without end where one is in a repetition."""
    count = 0.0
    for operator, argument in items:
        inner = max([_repetitions(part) for part in _parts(str(operator), argument)], default=0.0)
        if str(operator).endswith("REPEAT"):
            least, most, _ = argument
            inner = float("inf") if inner and most > 1 else inner + (least != most)
        count += inner + (str(operator) == "BRANCH")
    return count


def _parts(operator: str, argument: Any) -> list[Any]:
    """The expressions in a part of another."""
    if operator == "BRANCH":
        return list(argument[1])
    if operator in ("SUBPATTERN", "ASSERT", "ASSERT_NOT") or operator.endswith("REPEAT"):
        return [argument[-1]]
    return []


def _ends(items: Iterable[Any], text: str, starts: Positions, ignores_case: bool) -> Positions:
    """Where matches of an expression end that start at some positions."""
    for operator, argument in items:
        starts = _step(str(operator), argument, text, starts, ignores_case)
    return starts


def _step(operator: str, argument: Any, text: str, starts: Positions, ignores_case: bool) -> Positions:
    """`_ends` of one part of an expression."""

    def ends(items: Iterable[Any], positions: Positions) -> Positions:
        return _ends(items, text, positions, ignores_case)

    if operator in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        test = _letter(operator, argument, ignores_case)
        return frozenset(i + 1 for i in starts if i < len(text) and test(text[i]))
    if operator == "BRANCH":
        return frozenset().union(*(ends(one, starts) for one in argument[1]))
    if operator == "SUBPATTERN":
        _, switched_on, switched_off, inner = argument  # flags of a group, as in (?i:...)
        inside = (ignores_case or bool(switched_on & re.IGNORECASE)) and not switched_off & re.IGNORECASE
        return _ends(inner, text, starts, inside)
    if operator in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeated(argument, starts, ends)
    if operator == "AT":
        return frozenset(i for i in starts if _is_at(str(argument), text, i))
    if operator in ("ASSERT", "ASSERT_NOT"):
        direction, inner = argument
        wanted = operator == "ASSERT"
        if direction > 0:
            return frozenset(i for i in starts if bool(ends(inner, frozenset([i]))) is wanted)
        ending = ends(inner, frozenset(range(len(text) + 1)))  # a match that ends at a position started before it
        return frozenset(i for i in starts if (i in ending) is wanted)
    raise ValueError(
        f"A regular expression with {operator.lower()} and repetitions in each other may take forever on a module's "
        "name. Write a list of names."
    )


def _repeated(argument: Any, starts: Positions, ends: Callable[[Any, Positions], Positions]) -> Positions:
    """Where repetitions end: more of them add no position once none is new."""
    least, most, inner = argument
    positions = starts
    for _ in range(least):
        after = ends(inner, positions)
        if after == positions:
            break
        positions = after
    reached, times = positions, least
    while positions and times < most:
        positions = ends(inner, positions) - reached
        reached, times = reached | positions, times + 1
    return reached


def _letter(operator: str, argument: Any, ignores_case: bool) -> Callable[[str], bool]:
    """The test of a single letter."""
    if operator == "ANY":
        return lambda letter: letter != "\n"
    choices = [(operator, argument)] if operator != "IN" else argument
    negated = operator == "NOT_LITERAL" or str(choices[0][0]) == "NEGATE"

    def test(letter: str) -> bool:
        spellings = {letter, letter.lower(), letter.upper()} if ignores_case else {letter}
        found = any(_is_one(str(kind), value, one) for kind, value in choices for one in spellings)
        return found is not negated

    return test


def _is_one(kind: str, value: Any, letter: str) -> bool:
    """Whether a letter is one of a class of letters."""
    if kind in ("LITERAL", "NOT_LITERAL"):
        return ord(letter) == value
    if kind == "RANGE":
        return bool(value[0] <= ord(letter) <= value[1])
    if kind != "CATEGORY":
        return False
    name = str(value).removeprefix("CATEGORY_")
    tests = {"DIGIT": str.isdigit, "SPACE": str.isspace, "WORD": lambda one: one.isalnum() or one == "_"}
    return bool(tests[name.removeprefix("NOT_")](letter)) is not name.startswith("NOT_")


def _is_at(place: str, text: str, position: int) -> bool:
    """Whether a position is the beginning, the end or a boundary of a word."""
    if "BEGINNING" in place:
        return position == 0
    if "END" in place:
        return position == len(text)
    sides = [re.match(r"\w", text[i]) is not None for i in (position - 1, position) if 0 <= i < len(text)]
    is_boundary = sum(sides) == 1
    return is_boundary is not ("NON" in place)
