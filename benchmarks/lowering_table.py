"""The table of `lowering.py`, and what it answers."""

from typing import Any

GIB = 2**30
ROOM = {"v5e": 16, "v6e": 32, "h100": 79}  # GiB of a chip


def table(records: list[dict[str, Any]]) -> str:
    """Markdown of the records."""
    rows = [_row(record) for record in records]
    head = "| model | base | step | chips | mesh | batch | a chip, GiB | of | arguments | temporaries | "
    head += "TFLOP | without adapters | compiled in s |"
    return "\n".join([INTRODUCTION, *_answers(records), "", head, "|---" * 13 + "|", *rows, ""])


INTRODUCTION = """# Compiled ahead of time

Written by `make lowering`: train and decode steps of Llama shapes, LoRA r=16 on all linear layers with AdamW, compiled
for machines that are only described, and what the compiler says. Memory of a chip is arguments, temporaries and outputs
less what outputs take over. Each layer is recomputed in the backward pass; a batch is rows x tokens / rows at once;
decoding reads one token of each row on a cache of so many slots. TFLOP are those of all products in the program, on all
chips (the compiler's own count, in the records, takes a loop's body once); without adapters means the loss and its
gradient down to the embeddings. In every program it is asserted that no product has the shape of a frozen weight, as
its gradient would have, and with an int8 base that no buffer between fusions is a weight in float.
"""


def _row(record: dict[str, Any]) -> str:
    gib = {name: record[name] / GIB for name in ("per_chip", "argument", "temp")}
    ratio = "-"
    if removed := record["operations_without_adapters"]:
        ratio = f"{removed / 1e12:.2f} ({record['operations'] / removed:.3f} of it)"
    batch = f"{record['rows']} x {record['length']}" + (f" / {record['micro']}" if record["micro"] else "")
    cells = [
        *(record["size"], record["base"], record["work"], record["chip"], record["mesh"], batch),
        *(f"{gib['per_chip']:.2f}", ROOM[record["chip"].split(":")[0]], f"{gib['argument']:.2f}", f"{gib['temp']:.2f}"),
        *(f"{record['operations'] / 1e12:.2f}", ratio, f"{record['compile_seconds']:.0f}"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _answers(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        if (record["size"], record["base"], record["work"]) == ("70b", "int8", "train"):
            used, room = record["per_chip"] / GIB, ROOM[record["chip"].split(":")[0]]
            met = "met" if used <= room else "not met"
            lines.append(f"- 70B with int8 LoRA fits 16 chips of {room} GiB: **{met}**, {used:.2f} GiB a chip.")
    trained = {tuple(r[n] for n in SAME) + (r["base"],): r["per_chip"] for r in records if r["work"] == "train"}
    for key, used in trained.items():
        other = trained.get((*key[:-1], "bfloat16"))
        if key[-1] == "int8" and other:
            met = "met" if used < 0.6 * other else "not met"
            lines.append(
                f"- int8 training memory under 0.6 of bf16's ({key[0]}, {key[1]}): **{met}**, {used / other:.2f}."
            )
    for record in records:
        if removed := record["operations_without_adapters"]:
            ratio = record["operations"] / removed
            met = "met" if ratio < 1.1 else "not met"
            lines.append(
                f"- Operations of a LoRA step within 10 % of those without adapters ({record['size']}, "
                f"{record['base']}, {record['chip']}): **{met}**, {ratio:.3f}."
            )
    return lines


SAME = ("size", "chip", "mesh", "rows", "length", "micro")
