"""Write docs/combinations.md: what became of random combinations of the fields of PEFT's types.

    python tools/combinations_table.py build/combinations docs/combinations.md

The folder has a file of each type, which tests/test_random_configs.py leaves there with ``--full-grid``.
"""

import argparse
import collections
import json
import re
from pathlib import Path
from typing import Any

HEAD = """# Random combinations of options

Of each type of PEFT 0.21.2 that is here, {count} combinations of the fields of its config, drawn at random from the
values of `tests/random_configs.py`: up to {most} fields away from their defaults beside those that are always drawn.
PEFT makes a model of each on a tiny Llama, moves all that it trains by random numbers and writes its file. We read that
file: the logits agree to `1e-5 * max(1, max|logit|)` in float32, so do those of the merged model where there is one,
and the file that we write of it equals PEFT's in every field, key and byte. Every fourth combination is started here
too, and has tensors of the shapes of PEFT's. Written by `make conformance-full`.

- **equal**: as said. In {doubled} of them float32 loses too many digits, so that both were compared in float64, with
  norms and softmax in float32 and with the same tolerance.
- **moved**: those of the equal ones in which the adapter moves the logits by more than 100 times the tolerance.
- **merged**: those of the equal ones that have a merged model. Where there is none, an error says why.
- **both**: PEFT raises an error, of whatever kind, and we refuse the combination by name.
- **here**: PEFT makes it, and we refuse it by name (below).
- **PEFT alone**: PEFT raises an error, and here it is accepted (below).
- **there**: PEFT is at fault (below): it cannot read the file that it wrote, reads it as something else, leaves layers
  out of it, or ignores a field. Of OSF, both lose digits.
- **different**: none of these.

| type | tried | equal | moved | merged | both | here | PEFT alone | there | different |
|---|---|---|---|---|---|---|---|---|---|
"""
COLUMNS = (
    ("equal",),
    ("refused by both",),
    ("refused here",),
    ("refused by PEFT alone",),
    ("PEFT cannot read its file", "equal to what PEFT reads"),
)
EXPLAINED = ("refused by PEFT alone", "PEFT cannot read its file", "equal to what PEFT reads", "different")
# What differs between errors of one kind: tensors, names in quotes, values of fields, lists and numbers.
PARTICULARS = re.compile(
    r"base_model[\w.]+|\([\d, ]+\)|\[[^\]]*\]|\{[^}]*\}|'[^']*'|(?<![\w.])-?\d+(\.\d+)?(e-?\d+)?(?!\w)"
)

Outcomes = dict[str, list[dict[str, Any]]]


def page(outcomes: Outcomes, most: int) -> str:
    """The whole page."""
    least, count = min(map(len, outcomes.values())), max(map(len, outcomes.values()))
    rows = [row(name, found) for name, found in sorted(outcomes.items())]
    everything = [one for found in outcomes.values() for one in found]
    rows.append(row("all", everything))
    doubled = sum(one.get("by_double", False) for one in everything)
    return (
        HEAD.format(count=count if least == count else f"{least} to {count}", most=most, doubled=doubled)
        + "\n".join(rows)
        + "\n"
        + reasons(outcomes)
        + refusals(outcomes)
    )


def row(name: str, found: list[dict[str, Any]]) -> str:
    """The line of a type."""
    kinds = collections.Counter(one["kind"] for one in found)
    equal = [one for one in found if one["kind"] == "equal"]
    moved = sum(one["moves"] for one in equal)
    merged = sum(not one["words"] for one in equal)
    numbers = [sum(kinds[kind] for kind in column) for column in COLUMNS]
    numbers[-1] += sum(one["kind"] == "different" and one["reason"] is not None for one in found)
    cells = [len(found), numbers[0], moved, merged, *numbers[1:], len(found) - sum(numbers)]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def reasons(outcomes: Outcomes) -> str:
    """The section of what is otherwise than in PEFT, each with its reason."""
    lines = []
    for kind in EXPLAINED:
        counts: collections.Counter[str] = collections.Counter()
        types: dict[str, set[str]] = collections.defaultdict(set)
        for name, found in outcomes.items():
            for one in found:
                if one["kind"] == kind:
                    reason = one["reason"] or f"A defect: {one['words']}"
                    counts[reason] += 1
                    types[reason].add(name)
        for reason, number in counts.most_common():
            lines.append(f"| {kind} | {number} | {', '.join(sorted(types[reason]))} | {reason} |")
    table = "\n".join(lines)
    return f"\n## Why they differ\n\n| | combinations | types | why |\n|---|---|---|---|\n{table}\n"


def refusals(outcomes: Outcomes) -> str:
    """The section of what is refused here and not by PEFT, by the words of the error without its particulars."""
    counts: collections.Counter[str] = collections.Counter()
    types: dict[str, set[str]] = collections.defaultdict(set)
    for name, found in outcomes.items():
        for one in found:
            if one["kind"] == "refused here":
                first = one["words"].removeprefix("ValueError: ").partition("; base_model")[0]
                words = PARTICULARS.sub("…", first).replace("|", "\\|").removesuffix(".") + "."
                counts[words] += 1
                types[words].add(name)
    lines = []
    for words, number in counts.most_common():
        lines.append(f"| {number} | {', '.join(sorted(types[words]))} | {words} |")
    table = "\n".join(lines)
    return f"\n## What is refused here alone\n\n| combinations | types | the error |\n|---|---|---|\n{table}\n"


def main() -> None:
    """Read the folder and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--most", type=int, default=6, help="how many fields a combination sets at most")
    options = parser.parse_args()
    outcomes = {file.stem: json.loads(file.read_text()) for file in sorted(options.folder.glob("*.json"))}
    options.page.write_text(page(outcomes, options.most))


if __name__ == "__main__":
    main()
