"""The table of conformance is that of the tests at hand: no row is missing, none is left over."""

import re
from pathlib import Path

import conformance
import pytest

pytest.importorskip("torch")
import test_peft_families  # noqa: E402
import test_peft_parity  # noqa: E402
import test_prompt_families  # noqa: E402
import test_prompt_parity  # noqa: E402
import test_random_configs  # noqa: E402
import test_t5_peft  # noqa: E402
import test_xlora  # noqa: E402

FILE = Path(__file__).parents[1] / "docs" / "conformance.md"
TESTS = [
    (test_peft_parity, test_peft_parity.PAIRS),
    (test_peft_families, test_peft_families.PAIRS),
    (test_t5_peft, test_t5_peft.PAIRS),
    (test_prompt_parity, test_prompt_parity.PAIRS),
    (test_prompt_families, test_prompt_families.CASES),
    (test_xlora, [(row,) for row in test_xlora.XLORA]),
]


def test_the_table_has_the_rows_of_the_tests():
    want = {conformance.named(module.described(*case)) for module, cases in TESTS for case in cases}
    found = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| ([\de.-]+) \|$", FILE.read_text(), re.MULTILINE)
    assert {row[:3] for row in found} == want, "run `make conformance`"
    assert all(float(row[3]) <= conformance.TOLERANCE for row in found)
    assert len(found) == len(want)


def test_a_difference_is_noted_before_it_fails():
    conformance.seen.clear()
    with pytest.raises(AssertionError):
        conformance.close([1.0, 4.0], [1.0, 2.0])
    assert conformance.seen == [1.0]
    conformance.seen.clear()


def test_the_page_of_combinations_has_each_type_and_no_difference():
    page = (FILE.parent / "combinations.md").read_text()
    rows = {name: cells.split("|") for name, cells in re.findall(r"^\| (\w+) \|([ \d|]+)\|$", page, re.MULTILINE)}
    assert set(rows) - {"all"} == set(test_random_configs.peft_types())
    for name, cells in rows.items():
        tried, equal, *_, different = map(int, cells)
        assert equal > tried / 5 and different == 0, name
