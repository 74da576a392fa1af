"""The options of data that several commands have. They import nothing that takes long."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from peft_jax.cli.shared.command_line import Option, flag
from peft_jax.cli.shared.common_options import CUTOFF, DATA, TEMPLATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFileOptions:
    """Where data is, which of its columns are used, and how its texts become rows."""

    data: Annotated[tuple[str, ...], DATA]
    """JSON, JSONL, CSV, TSV, Parquet or Arrow file, perhaps compressed (.gz), or id of a data set on the hub: records
    with instruction and output (and input, system, history), question and answer, prompt and completion (texts or
    messages), messages or conversations (and system, tools), or text; for SEQ_CLS with text (and text_pair) and label
    or labels, for TOKEN_CLS with tokens and tags or ner_tags, for QUESTION_ANS in SQuAD's form.
    Where a prompt has several tasks, with task_id too. May be given several times; data.json@2 beside other.json@1
    gives that data two thirds of the examples."""
    columns: Annotated[tuple[str, ...] | None, Option(metavar="FIELD=COLUMN")] = None
    """Columns that hold the fields of other names, such as instruction=query output=reply."""
    data_split: Annotated[str | None, Option(metavar="NAME")] = None
    """Split of data sets on the hub, by default train; train[:10%] is a part of it."""
    data_subset: Annotated[str | None, Option(metavar="NAME")] = None
    """Configuration of data sets on the hub that have several."""
    data_revision: Annotated[str | None, Option(metavar="NAME")] = None
    """Branch, tag or commit of data sets on the hub."""
    prompt_template: Annotated[str | None, TEMPLATE] = None
    """For instruction data: chat (the tokenizer's chat template), raw (nothing), short, alpaca, or a JSON file in
    alpaca-lora's format; by default that of the adapter's training, else chat where there is such a template, else
    short."""
    cutoff_len: Annotated[int | None, CUTOFF] = None
    """Most tokens of an example; by default 2048, or what the model's positions leave if that is less."""
    long: Literal["truncate", "drop", "split"] = "truncate"
    """Longer examples are cut, left out, or split into several; how many is reported. Texts that answer
    questions are left out, or read in overlapping windows."""
    stride: Annotated[int | None, Option(aliases=("--doc-stride",))] = None
    """Tokens that neighbouring windows of a long text share: of QUESTION_ANS by default 128, or a quarter of cutoff-len
    if that is less; of TOKEN_CLS with --long split by default 0."""


def check_streaming(given: Mapping[str, Any]) -> None:
    """Raise ValueError for options, by name, that need all examples beside a --streaming that reads one at a time."""
    for name, value in (("packing", True), ("long", "split")):
        if given["streaming"] and given.get(name) == value:
            typed = flag(name) if value is True else f"{flag(name)} {value}"
            raise ValueError(f"{typed} needs all examples at once, and --streaming reads one at a time. Drop one.")
