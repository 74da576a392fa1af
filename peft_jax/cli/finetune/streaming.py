"""`peft-jax finetune --streaming`: data of which a batch's rows are read and tokenized when the batch is needed."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from peft_jax.cli.finetune.options import DataOptions
from peft_jax.cli.finetune.setup import (
    Examples,
    check_token,
    digest_of,
    layout_of_data,
    padded,
    recorded_layout,
    said_of_layout,
    split_places,
    training_rows,
)
from peft_jax.cli.shared.data_options import DataFileOptions
from peft_jax.cli.shared.data_sources import (
    Loaded,
    Source,
    check_template,
    parse_columns,
    renamed,
    sources_of,
    weights_of,
)
from peft_jax.cli.shared.row_layout import said_of_chats, said_of_length
from peft_jax.cli.shared.task import RowOptions, Task
from peft_jax.cli.shared.training_layout import TrainingLayout
from peft_jax.methods.base import PeftConfig
from peft_jax.models.handles.base import ModelHandle
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.batches import Data, Mixture, Padded
from peft_jax.train.data.chats import ChatMasks
from peft_jax.train.data.long_examples import Example, NothingFits
from peft_jax.train.data.record_forms import Form, form_of, said_of_unused, to_record, unused_fields
from peft_jax.train.data.records import AnyRecord
from peft_jax.train.data.row_files import RULE, JoinedRows, open_rows

SAMPLE = 1024  # records of each source that are looked at before the run starts


@dataclasses.dataclass(frozen=True)
class Streams(Loaded):
    """Sources of which ``records`` are the first ones.

    Attributes:
        rows: The rows of all sources.
        sources: The sources.
        forms: The form of each source's records.
        columns: The column of each field.
    """

    rows: JoinedRows
    sources: Sequence[Source]
    forms: Sequence[Form]
    columns: Mapping[str, str]

    def record(self, place: int) -> AnyRecord:
        """Read a record.

        Raises:
            ValueError: If it is damaged, or of another form than the first one of its source.
        """
        number, inner = self.rows.file_of(place)
        source = self.sources[number]
        row = self.rows[place]
        columns = {field: column for field, column in self.columns.items() if isinstance(row, dict) and column in row}
        [row] = renamed([row], columns, source)
        return to_record(row, self.forms[number], f"record {inner + 1} of {source.name}")


def load_streams(options: DataFileOptions) -> Streams:
    """Open the files, and read the first records of each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file cannot be streamed, or is unusable as `load_records` says.
    """
    sources = sources_of(options)
    columns = parse_columns(options.columns or ())
    files, forms, records, notes = [], [], [], []
    for source in sources:
        if source.is_on_hub:
            raise ValueError(f"{source.name} is a data set on the hub. {RULE} Write it as Parquet (to_parquet).")
        file = open_rows(Path(source.name))
        first = renamed([file[place] for place in range(min(SAMPLE, len(file)))], columns, source)
        form = form_of(first[0], f"record 1 of {source.name}")
        unused: dict[str, None] = {}
        for number, row in enumerate(first, 1):
            records.append(to_record(row, form, f"record {number} of {source.name}"))
            unused |= dict.fromkeys(unused_fields(row, form))
        if unused:
            notes.append(said_of_unused(source.name, unused))
        files.append(file)
        forms.append(form)
    check_template(options, records)
    counts = tuple(len(file) for file in files)
    rows = JoinedRows(files)
    return Streams(records, counts, weights_of(sources), tuple(notes), rows, sources, forms, columns)


def stream_data(
    task: Task,
    streams: Streams,
    tokenizer: Tokenizer,
    base: ModelHandle,
    options: DataOptions,
    seed: int,
    config: PeftConfig,
    recorded: TrainingLayout | None = None,
) -> Examples:
    """Split the rows as `make_data` does, and lay out those for validation; the others are read when they are needed.

    The arguments and errors are those of `make_data`.
    """
    used = layout_of_data(options.prompt_template, recorded, streams.records, tokenizer, task)
    rows = training_rows(options, base, used.layout, config)
    first = task.encode(streams.records, tokenizer, base, rows)
    layout = recorded_layout(used, tokenizer, rows)
    ends = frozenset(rows.masks.ends)
    training, validation = split_places(len(streams.rows), options.val_size, seed)

    def read(place: int) -> Example:
        record = streams.record(place)
        task.check([record])
        quiet = dataclasses.replace(rows, masks=ChatMasks(), watch=iter)
        return _encoded(record, place, streams, task, tokenizer, base, quiet)

    def part_of(places: np.ndarray) -> Data:
        from peft_jax.train.data.streamed import Streamed  # which imports grain

        return Streamed(read, places, streams.rows.blocks, rows.cutoff_len, padded_like.pad)

    padded_like = padded(task, first.examples, rows.cutoff_len, base)
    held_out, left_out = None, 0
    if validation.size:
        kept, left_out = _all(read, validation.tolist())
        held_out = padded(task, kept, rows.cutoff_len, base)
    data: Data
    if streams.weights is None:
        data = part_of(training)
    else:
        bounds = np.searchsorted(training, streams.rows.firsts)
        parts = [training[start:end] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        for number, part in enumerate(parts, 1):
            if not part.size:
                raise ValueError(f"of the {number}. --data no example is left to train on. Give more of it.")
        data = Mixture([part_of(part) for part in parts], streams.weights)
    sample = Padded(first.examples, data.lengths[-1], padded_like.pad, shortest=data.lengths[0])
    said = [said_of_streams(streams, validation.size, left_out), said_of_length(first, rows)]
    said = [" ".join(said), said_of_layout(used, rows.masks), *streams.notes]
    said += said_of_chats(streams.records, tokenizer)
    digest = digest_of(first.examples)
    return Examples(data, held_out, "\n".join(said), digest, layout, ends, sample=sample)


def _encoded(
    record: AnyRecord,
    place: int,
    streams: Streams,
    task: Task,
    tokenizer: Tokenizer,
    base: ModelHandle,
    rows: RowOptions,
) -> Example:
    """One record as an example.

    Raises:
        NothingFits: If it is left out.
        ValueError: If it cannot be used; the message names its file.
    """
    try:
        [example] = task.encode([record], tokenizer, base, rows).examples
        check_token(int(example.input_ids.max()), base.config)
    except NothingFits:
        raise
    except ValueError as error:
        number, inner = streams.rows.file_of(place)
        where = f"record {inner + 1} of {streams.sources[number].name}"
        raise ValueError(f"{where} cannot be used: {error}") from error
    return example


def _all(read: Callable[[int], Example], places: Sequence[int]) -> tuple[list[Example], int]:
    """The examples of rows, and how many of these are left out.

    Raises:
        NothingFits: If all are.
    """
    found: list[Example] = []
    for place in places:
        with contextlib.suppress(NothingFits):
            found.append(read(place))
    if not found:
        raise NothingFits(f"none of {len(places)} examples for validation fits. Raise cutoff_len.")
    return found, len(places) - len(found)


def said_of_streams(streams: Streams, validation: int = 0, left_out: int = 0) -> str:
    """A sentence on the rows."""
    said = f"{len(streams.rows)} records, read when they are needed"
    if validation:
        said += f"; {validation} of them, which are kept in memory, for validation"
    if left_out:
        said += f" ({left_out} left out)"
    return f"{said}. Of the first {len(streams.records)}:"
