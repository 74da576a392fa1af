"""The table of `lowering.py`, and what it answers."""

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
GIB = 2**30
INT8_HEAD = "int8+head"
INT8 = ("int8", INT8_HEAD)  # bases in int8: the layers alone, or the output head too
NF4_HEAD = "nf4+head"
NF4 = ("nf4", NF4_HEAD)
SAME = ("size", "chip", "mesh", "rows", "length", "micro")  # of a pair
LARGE = {"70b": "70B", "Qwen3-30B-A3B": "Qwen3-30B-A3B", "gpt-oss-20b": "gpt-oss-20b"}  # as the answers call them
ROOM = {"v5e": 16, "v6e": 32, "h100": 79}  # GiB of a chip


def table(
    records: list[Record],
    missing: Sequence[str] = (),
    by_hand: Sequence[Record] = (),
    by_hand_missing: Sequence[str] = (),
) -> str:
    """Markdown of the records.

    Args:
        records: Of `lowering.py`; those that were refused come after the others.
        missing: The names of cases without a record.
        by_hand: Of `lowering_by_hand.py`; they have a table of their own at the end.
        by_hand_missing: The names of its cases without a record.
    """
    refused = [_refused(record) for record in records if "refused" in record]
    records = [record for record in records if "refused" not in record]
    rows = [_row(record) for record in records]
    answers = [*fits(records), *nf4_fits(records), *int8_share(records), *operations_share(records)]
    lines = [
        f"- {one['target']} ({one['at']}): **{'met' if one['met'] else 'not met'}**, {one['value']:.3f}."
        for one in answers
    ]
    head = "| model | base | step | chips | mesh | batch | a chip, GiB | of | arguments | temporaries | "
    head += "TFLOP | without adapters | compiled in s | on |"
    written = [record for record in records if record.get("dequantized")]
    notes = ["", WRITTEN, *[_written(record) for record in written]] if written else []
    notes += ["", REFUSED, *refused] if refused else []
    notes += ["", f"Not compiled yet: {'; '.join(missing)}."] if missing else []
    notes += ["", FOREIGN, *[_beside(record) for record in by_hand]] if by_hand else []
    notes += ["", f"Not compiled yet: {'; '.join(by_hand_missing)}."] if by_hand_missing else []
    return "\n".join([INTRODUCTION, *lines, "", head, "|---" * 14 + "|", *rows, *notes, ""])


INTRODUCTION = """# Compiled ahead of time

Written by `make lowering`: train and decode steps of Llama shapes, LoRA r=16 on all linear layers with AdamW,
compiled for machines that are only described, and what the compiler says. Memory of a chip is arguments, temporaries
and outputs less what outputs take over. Each layer is recomputed in the backward pass; a batch is rows x tokens /
rows at once; decoding reads one token of each row on a cache of that many slots. TFLOP are those of all products in
the program, on all chips (the compiler's own count, in the records, takes a loop's body once), where a row of a
grouped product counts with the matrix of its expert alone, as on TPU and GPU; without adapters means the loss and its
gradient down to the embeddings. In every program it is asserted that no product has the shape of a frozen weight, as
its gradient would have, and with an int8 base that no buffer between fusions is a weight in float.
Seconds are those of machines with other work.
"""

WRITTEN = """## Where a compiler writes dequantized weights

For the H100, XLA converts the numbers of an int8 base inside a product, but fuses no scales of blocks into one. So each
nf4 weight is written in bfloat16 before its product and read once, and the space is used again for the next one; none
is kept. Other forms were compiled for 1152 tokens, 4096 inputs and 14336 outputs, forward and backward, and all were
written: two products with the halves of each byte, which is what the TPU's compiler fuses; the same with the inputs as
one axis, scales repeated along it, and numbers as int8 or int32; selects instead of a gather; int4 and int8 by groups
of 128. A product for each block with its scales after it was not tried, as it writes a result for each block. The
compiler of v5e fuses the two products in the whole step, and writes no weight; that of v6e had the same answer
for a scan of three such layers, before layers were turned one by one (`benchmarks/NOTES.md`).
"""


def _written(record: Record) -> str:
    """The buffers of one program."""
    place = f"{record['size']}, {record['base']}, {record['work']}, {record['chip']}"
    return f"- {place}: {', '.join(f'`{one}`' for one in record['dequantized'])}."


REFUSED = """Some shapes of mixtures, with LoRA on attention and on each expert, are not in the table: the compiler has
no memory for them, or a buffer between fusions is a weight in float. What was said of each:
"""


def _refused(record: Record) -> str:
    batch = f"{record['rows']} x {record['length']} / {record['micro']}"
    case = [record[name] for name in ("size", "base", "work", "chip", "mesh")]
    return f"- {', '.join([*case, batch])}: `{record['refused']}`"


FOREIGN = """## Other people's models

Written by `benchmarks/lowering_by_hand.py`: the loss and the gradients of LoRA's factors (r=16, float32) of decoders
that are not this package's, with LoRA written by hand and with LoRA by `pj.adapt`. Those of 512 features have 8 heads,
2048 features in the feed-forward network and 2048 tokens, and get 4 rows of 256; those of 2048 features have 16 heads,
8192 features and 32000 tokens, and get 4 rows of 512. `einsum` has kernels `(in, heads, head_dim)`
as tunix's Llama, and layers outside a scan; `scanned` is a linen module under `nn.scan`; with `remat` the layers are
computed again. Traffic is what the compiler says that a step reads and writes (of the H100 it says nothing). Of the two
figures of a cell the first is of LoRA by hand; the goal is a second one that is no larger, of temporaries and traffic.

| features | model | layers | base | chip | temporaries, MiB | traffic, GiB | copies | goal | on |
|---|---|---|---|---|---|---|---|---|---|"""


FOREIGN_CASES = [
    (features, model, remat, base, chip)
    for features in (512, 2048)
    for chip in ("v5e:1x1", "v6e:1x1", "h100")
    for model in ("einsum", "scanned")
    for remat in (False, True)
    for base in ("bfloat16", "int8")
]


def foreign_name(features: int, model: str, remat: bool, base: str, chip: str) -> str:
    """What a case of another one's model is called in the records."""
    return f"{features} {model}{' remat' if remat else ''} {base} {chip}"


def _beside(record: Record) -> str:
    hand, ours = record["by_hand"], record["adapt"]
    name = f"{record['model']}{', remat' if record['remat'] else ''}"
    memory = f"{hand['temporaries'] / 2**20:.1f}, {ours['temporaries'] / 2**20:.1f}"
    traffic = f"{hand['traffic'] / GIB:.3f}, {ours['traffic'] / GIB:.3f}" if hand["traffic"] else "-"
    is_met = all(ours[part] <= hand[part] for part in ("temporaries", "traffic"))
    cells = [
        *(record["features"], name, record["layers"], record["base"], record["chip"], memory, traffic),
        *(f"{hand['copies']}, {ours['copies']}", "met" if is_met else "**not met**", record["date"]),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _row(record: Record) -> str:
    gib = {name: record[name] / GIB for name in ("per_chip", "argument", "temp")}
    ratio = "-"
    if removed := record["operations_without_adapters"]:
        ratio = f"{removed / 1e12:.2f} ({record['operations'] / removed:.3f} of it)"
    batch = f"{record['rows']} x {record['length']}" + (f" / {record['micro']}" if record["micro"] else "")
    cells = [
        *(record["size"], record["base"], record["work"], record["chip"], record["mesh"], batch),
        *(f"{gib['per_chip']:.2f}", memory(record), f"{gib['argument']:.2f}", f"{gib['temp']:.2f}"),
        *(f"{record['operations'] / 1e12:.2f}", ratio, f"{record['compile_seconds']:.0f}", record["date"]),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def fits(records: list[Record]) -> list[Record]:
    """Whether training large models on int8 fits their chips: GiB of each."""
    found = []
    for record in records:
        is_large = record["size"] in LARGE and (record["base"], record["work"]) == ("int8", "train")
        if not is_large or "refused" in record:
            continue
        chips = math.prod(map(int, record["chip"].split(":")[1].split("x")))
        used = record["per_chip"] / GIB
        target = f"{LARGE[record['size']]} with int8 LoRA fits {chips} chips of {memory(record)} GiB"
        found.append(answer(target, record, used) | {"met": used <= memory(record)})
    return found


def nf4_fits(records: list[Record]) -> list[Record]:
    """Whether training 8B on nf4 takes at most 7 GiB, and 70B fits 8 chips of 16 GiB."""
    limits = {"8b": ("8B with nf4 LoRA takes at most 7 GiB of a chip", 7)}
    limits["70b"] = ("70B with nf4 LoRA fits 8 chips of 16 GiB", 16)
    return [
        answer(limits[record["size"]][0], record, used := record["per_chip"] / GIB)
        | {"met": used <= limits[record["size"]][1]}
        for record in records
        if record["base"] in NF4 and record["work"] == "train"
    ]


def int8_share(records: list[Record]) -> list[Record]:
    """Memory of training on int8 over that on bfloat16, of pairs that are else the same."""
    trained = {(*(r[name] for name in SAME), r["base"]): r for r in records if r["work"] == "train"}
    pairs = [(one, trained.get((*key[:-1], "bfloat16"))) for key, one in trained.items() if key[-1] in INT8]
    return [
        answer("int8 training memory under 0.6 of bf16's", one, share := one["per_chip"] / other["per_chip"])
        | {"met": share < 0.6}
        for one, other in pairs
        if other
    ]


def operations_share(records: list[Record]) -> list[Record]:
    """Operations of a training step over those without adapters."""
    return [
        answer("operations of a LoRA step within 10 % of those without adapters", record, share := one / without)
        | {"met": share < 1.1}
        for record in records
        for one, without in [(record["operations"], record["operations_without_adapters"])]
        if without
    ]


def answer(target: str, record: Record, value: float) -> Record:
    """What a compiled program says of a target."""
    return {"target": target, "at": f"{record['size']}, {record['base']}, {record['chip']}", "value": value}


def memory(record: Record) -> int:
    """GiB of a chip."""
    return ROOM[record["chip"].split(":")[0]]
