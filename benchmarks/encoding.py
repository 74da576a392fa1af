"""The processor time that data take to become rows: many short examples, and one long text.

    python benchmarks/encoding.py

It encodes by the functions of `peft-jax finetune`, with the tokenizer of the demo's checkpoint.
"""

import dataclasses
import time

import tyro

from peft_jax.cli.demo_data import MODEL, TRAIN
from peft_jax.cli.shared.task import TASKS, RowOptions
from peft_jax.prompts.tokenizer import Tokenizer, read_tokenizer
from peft_jax.train.data.data_files import read_data
from peft_jax.train.data.long_examples import Long
from peft_jax.train.data.records import AnyRecord, PlainText
from peft_jax.train.data.template import load_layout


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work.

    Attributes:
        rows: Short examples, the demo's over and over.
        megabytes: Size of the long text, which is made of the same words.
        cutoff_len: The most tokens of a row.
    """

    rows: int = 100_000
    megabytes: int = 50
    cutoff_len: int = 2048


def encoded(records: list[AnyRecord], tokenizer: Tokenizer, cutoff_len: int, long: Long) -> str:
    """Encode records; what it took, in words."""
    options = RowOptions(cutoff_len, load_layout("short"), long=long)
    begin = time.process_time()
    examples = TASKS["CAUSAL_LM"].encode(records, tokenizer, None, options).examples
    took = time.process_time() - begin
    tokens = sum(example.length for example in examples)
    return f"{took:.1f} s of the processor, {len(examples):,} rows, {tokens:,} tokens"


def main(settings: Settings) -> None:
    """Print what each kind takes."""
    tokenizer, records = read_tokenizer(MODEL), read_data(TRAIN)
    many = (records * (settings.rows // len(records) + 1))[: settings.rows]
    print(f"{settings.rows:,} examples: {encoded(many, tokenizer, settings.cutoff_len, 'truncate')}", flush=True)
    words = " ".join(f"{record.instruction} {record.output}" for record in records)  # type: ignore[union-attr]
    size = settings.megabytes * 10**6
    text = PlainText((words * (size // len(words) + 1))[:size])
    for long in ("truncate", "split"):
        found = encoded([text], tokenizer, settings.cutoff_len, long)  # type: ignore[arg-type]
        print(f"a text of {settings.megabytes} MB, --long {long}: {found}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
