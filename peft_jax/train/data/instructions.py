"""Instruction data padded to one length: the short way from alpaca's records to arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.train.data.batches import Batch as Batch
from peft_jax.train.data.batches import evaluation_batches as evaluation_batches
from peft_jax.train.data.batches import rounded_up
from peft_jax.train.data.batches import training_batches as training_batches
from peft_jax.train.data.encode import IGNORE as IGNORE
from peft_jax.train.data.encode import Tokenizer, encode, encode_completion
from peft_jax.train.data.records import Record as Record
from peft_jax.train.data.records import read_records as read_records


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokenized examples, padded on the right to one length.

    Attributes:
        input_ids: Token ids, int32 (examples, length).
        attention_mask: 1 on tokens and 0 on padding, int32 (examples, length).
        labels: `input_ids` where a token is trained and `IGNORE` elsewhere, int32 (examples, length).
        too_long: How many examples were left out because they exceed the cutoff.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    too_long: int

    @property
    def length(self) -> int:
        """Tokens per example, padding included."""
        return int(self.input_ids.shape[1])

    @property
    def lengths(self) -> tuple[int, ...]:
        """The one length, for the batches."""
        return (self.length,)

    @property
    def pad(self) -> int:
        """The token id of rows that a batch lacks."""
        return 0

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.input_ids)

    def __getitem__(self, index: Any) -> Batch:
        """Return the example at an index, or the batch at a slice."""
        return Batch(
            input_ids=self.input_ids[index], attention_mask=self.attention_mask[index], labels=self.labels[index]
        )


def tokenize(
    records: Sequence[Record], tokenizer: Tokenizer, *, cutoff_len: int = 256, pad_to: int | None = None
) -> Tokens:
    """Tokenize records into examples of one length, as `peft_jax.train.data.encode` does.

    Args:
        records: The records.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        cutoff_len: Examples of more tokens are left out and counted in `Tokens.too_long`.
        pad_to: The common length. By default that of the longest kept example, rounded up to a multiple of 32.

    Returns:
        The examples in the order of the records.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or no example fits.
    """
    cutoff_len = min(cutoff_len, pad_to or cutoff_len)
    kept, too_long = encode(records, tokenizer, cutoff_len=cutoff_len)
    length = pad_to or min(cutoff_len, rounded_up(max(len(example.input_ids) for example in kept)))
    shape = (len(kept), length)
    input_ids = np.full(shape, tokenizer.eos_token_id, np.int32)
    attention_mask = np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    for row, example in enumerate(kept):
        count = len(example.input_ids)
        input_ids[row, :count] = example.input_ids
        attention_mask[row, :count] = 1
        labels[row, :count] = example.labels
    return Tokens(input_ids, attention_mask, labels, too_long)


def tokenize_prompts(records: Sequence[Record], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of the prompts alone, padded on the left for generation.

    Returns:
        Two int32 arrays (records, length), where length is a multiple of 32.
    """
    prompts = [encode_completion(record.prompt, "", tokenizer)[0][:-1] for record in records]
    length = rounded_up(max(map(len, prompts)))
    input_ids = np.full((len(prompts), length), tokenizer.eos_token_id, np.int32)
    attention_mask = np.zeros((len(prompts), length), np.int32)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
    return input_ids, attention_mask
