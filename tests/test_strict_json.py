"""JSON from elsewhere: each kind of damage is one short line with the file's name and the place, by one reader."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_house import FILES

from peft_jax.core.strict_json import DEEPEST, LONGEST_KEY, LONGEST_NUMBER, JSONError, parse_json
from peft_jax.core.text_files import LARGEST, read_object

DEEP = DEEPEST + 1
# A text, what is said of it, and where.
DAMAGED: dict[str, tuple[str, str, str]] = {
    "cut off": ('{"a": ', "Expecting value", "line 1 column 7 (char 6)"),
    "NaN": ('{"a":\n NaN}', "NaN is not a number", "line 2 column 2 (char 7)"),
    "infinity": ('{"NaN": [1, -Infinity]}', "-Infinity is not a number", "line 1 column 13 (char 12)"),
    "a float beyond any": ("[1.5, 1e400]", "the number '1e400' is beyond any float", "line 1 column 7 (char 6)"),
    "10**400": (f"[{10**399}]", "is beyond any float", "line 1 column 2 (char 1)"),
    "many digits": (f"[0, 0.{'0' * 5000}1]", "a number has 5003 characters", "line 1 column 5 (char 4)"),
    "very many digits": (f"[{'1' * 10**6}]", "a number has 1000000 characters", "line 1 column 2 (char 1)"),
    "a key that comes twice": ('{"b": "a", "a": 1, "a": 2}', "the key 'a' comes twice", "line 1 column 12 (char 11)"),
    "one spelled otherwise": (r'{"a": {}, "\u0061": 2}', "the key 'a' comes twice", "line 1 column 11 (char 10)"),
    "a long key": (json.dumps({"x": {"k" * 10**6: 1}}), "a key has 1000000 characters", "line 1 column 8 (char 7)"),
    "half of a pair": (r'{"a": "b", "c": "\ud800"}', "half of a surrogate pair", "line 1 column 17 (char 16)"),
    "half in a key": (r'{"\udc00": 1}', "half of a surrogate pair", "line 1 column 2 (char 1)"),
    "an escape of the shell's": ('["\udc80"]', "half of a surrogate pair", "line 1 column 2 (char 1)"),
    "deep lists": ("[" * DEEP + "]" * DEEP, "more than 100 lists and objects", "line 1 column 101 (char 100)"),
    "deep objects": ('{"a":' * 10**5 + "1" + "}" * 10**5, "more than 100 lists", "line 1 column 501 (char 500)"),
    "deep and cut off": ("[" * 10**6, "more than 100 lists", "line 1 column 101 (char 100)"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_named_with_its_place(case: str) -> None:
    text, reason, place = DAMAGED[case]
    with pytest.raises(JSONError) as error:
        parse_json(text)
    assert reason in error.value.reason and error.value.place == place
    assert len(str(error.value)) < 300 and len(str(error.value).splitlines()) == 1


SOUND = ["[]", "3", '"a"', "[1e308, -1, 0.1, 1e-400]", r'["\ud83d\ude00"]', '{"a": {"a": 1}, "b": [{"a": 2}]}', "null"]
SOUND += ["[" * DEEPEST + "]" * DEEPEST, "9" * 300, json.dumps({"k" * LONGEST_KEY: 1}), "[0." + "1" * 390 + "]"]


@pytest.mark.parametrize("text", SOUND, ids=lambda text: text[:12])
def test_the_rest_is_read_as_python_reads_it(text: str) -> None:
    assert len(text) < 20_000 and LONGEST_NUMBER > 300
    assert parse_json(text) == json.loads(text)


def test_files_that_hold_no_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    cases: dict[bytes, str] = {
        b"": "is not JSON (Expecting value: line 1 column 1 (char 0))",
        b"\xff\xfe{}": "is not UTF-8 text",
        b"\x80\x04": "is not UTF-8 text",
        b"[1]": "is not a JSON object but list",
        b"null": "is not a JSON object but NoneType",
    }
    for found, said in cases.items():
        file.write_bytes(found)
        with pytest.raises(ValueError) as error:
            read_object(file, "config", "Copy it again.")
        assert said in str(error.value) and str(file) in str(error.value) and "Copy it again." in str(error.value)
    with file.open("wb") as stream:
        stream.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match="has 100000001 bytes, more than 100000000"):
        read_object(file, "config", "Copy it again.")
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(file, "config", "") == {"a": 1}


def readers(file: Path) -> Iterator[int]:
    """The lines of a file on which Python's own reader of JSON is called or imported."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads", "json.JSONDecoder"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "json.decoder"):
            yield node.lineno


def test_nothing_else_reads_json() -> None:
    found = {file.name for file in FILES if any(readers(file))}
    assert found == {"strict_json.py"}
