"""How a command lays the rows of its data into micro batches."""

from collections.abc import Sequence

from peft_jax.cli.shared.task import Task
from peft_jax.models.handles.base import ModelHandle
from peft_jax.prompts.base import virtual_slots
from peft_jax.train import micro_layout
from peft_jax.train.data.batches import Data, fixed_lengths, longest_field
from peft_jax.train.data.micro_layout import MicroLayout


def choose_micro_layout(
    task: Task,
    model: ModelHandle,
    parts: Sequence[Data],
    batch_size: int,
    *,
    micro_batch_size: int | None = None,
    multiple: int = 1,
    longest: int | None = None,
) -> MicroLayout:
    """Choose rows and widths for data: several examples to a row where the model and its adapter know texts apart.

    Args:
        task: What is computed.
        model: The model, with its adapter.
        parts: The rows, of the same fields in all parts.
        batch_size: Examples of a batch.
        micro_batch_size: Rows that go through the model at once, as `micro_layout` takes it.
        multiple: The rows are a multiple of this.
        longest: The most tokens of an example, where the parts are the first rows of more.
    """
    first = parts[0][0]
    lengths = max((part.lengths for part in parts), key=lambda lengths: lengths[-1])
    if longest is not None:
        lengths = fixed_lengths(longest)
    if "decoder_input_ids" in first:  # of two lengths, and few of each are compiled
        return MicroLayout(micro_batch_size or batch_size, lengths, packed=False)
    alone = virtual_slots(model) or set(first) > {"input_ids", "attention_mask", "labels"}
    known = [longest_field(part[index]) for part in parts for index in range(len(part))]
    if longest is None:
        longest = lengths[-1]
    else:
        known.append(longest)
    return micro_layout(
        known,
        batch_size,
        packed=task.next_token and not alone,
        micro_batch_size=micro_batch_size,
        multiple=multiple,
        longest=longest,
        hidden_size=model.config.hidden_size,
    )
