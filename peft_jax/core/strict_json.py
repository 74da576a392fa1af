"""The one reader of JSON: strict, of bounded work, and with the place of what is wrong in each error.

Python's reader takes NaN, infinities and keys that come twice, stops at deep nesting by an exception of its own, and
gives text that cannot be encoded. Files from elsewhere are refused over each of these.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

DEEPEST = 100  # lists and objects in each other
LONGEST_NUMBER = 400  # characters
LONGEST_KEY = 10_000  # characters
SHOWN = 60  # characters of what is wrong
# Strings, brackets, and everything else between them.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+', re.DOTALL)


class JSONError(ValueError):
    """A text is not the JSON that is read here.

    Attributes:
        reason: What is wrong.
        place: Where: line and column.
    """

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(f"{reason}: {place}")
        self.reason, self.place = reason, place


class _Wrong(Exception):
    """A value that is refused, raised while a text is read: what it is, and a test that finds its token."""

    def __init__(self, reason: str, is_it: Callable[[str], bool]) -> None:
        super().__init__(reason)
        self.reason, self.is_it = reason, is_it


def parse_json(text: str) -> Any:
    r"""The value of a JSON text.

    Raises:
        JSONError: If it is not JSON, has NaN, an infinity, a number beyond any float or one of very many digits, a key
            that comes twice or is very long, half of a surrogate pair, or very deep nesting.

    Example:
        >>> parse_json('{"r": 4}')
        {'r': 4}
        >>> parse_json('{"r": NaN}')
        Traceback (most recent call last):
        ...
        peft_jax.core.strict_json.JSONError: NaN is not a number: line 1 column 7 (char 6)
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if _is_too_deep(value):
            raise RecursionError
        if "\\u" in text or not _is_encodable(text):
            _check_encodable(value)
    except json.JSONDecodeError as error:
        raise JSONError(error.msg, f"line {error.lineno} column {error.colno} (char {error.pos})") from None
    except RecursionError:
        raise JSONError(f"more than {DEEPEST} lists and objects in each other", _deep_place(text)) from None
    except _Wrong as error:
        start = next((match.start() for match in _tokens(text) if error.is_it(match.group())), 0)
        raise JSONError(error.reason, _place(text, start)) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise _Wrong(f"the key {shown(key)} comes twice in an object", _second_of(key))
            seen.add(key)
    if any(len(key) > LONGEST_KEY for key in found):
        key = max(found, key=len)
        raise _Wrong(f"a key has {len(key)} characters, more than {LONGEST_KEY}", lambda token: _is(token, key))
    return found


def _second_of(key: str) -> Callable[[str], bool]:
    """A test of tokens that holds for the second one that spells a key."""
    count = itertools.count()
    return lambda token: _is(token, key) and next(count) == 1


def _is(token: str, key: str) -> bool:
    """Whether a token is this string."""
    if not token.startswith('"'):
        return False
    try:
        return bool(json.loads(token) == key)
    except ValueError:
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise _Wrong(f"{name} is not a number", lambda token: token == name)


def _integer(digits: str) -> int:
    _check_number(digits)
    return int(digits)


def _float(digits: str) -> float:
    _check_number(digits)
    return float(digits)


def _check_number(digits: str) -> None:
    if len(digits) > LONGEST_NUMBER:
        raise _Wrong(
            f"a number has {len(digits)} characters, more than {LONGEST_NUMBER}", lambda token: token == digits
        )
    if math.isinf(float(digits)):
        raise _Wrong(f"the number {shown(digits)} is beyond any float", lambda token: token == digits)


def _is_too_deep(value: Any) -> bool:
    layer = [value]
    for _ in range(DEEPEST):
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return False
    return True


def _inside(value: Any) -> list[Any]:
    """The lists and objects that are directly in a value."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return []
    return [inner for inner in value if isinstance(inner, dict | list)]


def _check_encodable(value: Any) -> None:
    """Refuse halves of surrogate pairs, which no file and no tokenizer takes."""
    if not _is_encodable(json.dumps(value, ensure_ascii=False)):
        is_half = "a text has half of a surrogate pair"
        raise _Wrong(is_half, lambda token: token.startswith('"') and not _is_encodable(json.loads(token)))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokens(text: str) -> Iterator[re.Match[str]]:
    return TOKEN.finditer(text)


def _deep_place(text: str) -> str:
    depth = 0
    for match in _tokens(text):
        depth += (match.group() in ("[", "{")) - (match.group() in ("]", "}"))
        if depth > DEEPEST:
            return _place(text, match.start())
    return _place(text, 0)


def _place(text: str, start: int) -> str:
    """A position as Python's own errors write it."""
    line = text.count("\n", 0, start) + 1
    column = start - text.rfind("\n", 0, start)
    return f"line {line} column {column} (char {start})"


def shown(value: Any) -> str:
    """A value for a message, cut off where it is long.

    Example:
        >>> shown("q_proj"), len(shown("a" * 10**6))
        ("'q_proj'", 63)
    """
    written = repr(value[:SHOWN] if isinstance(value, str) else value)
    return written if len(written) <= SHOWN + 3 and written == repr(value) else written[:SHOWN] + "..."
