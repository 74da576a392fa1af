"""A batch of prompts without their answers, for generation."""

from collections.abc import Sequence

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.batches import rounded_up
from peft_jax.train.data.encode import encode_completion
from peft_jax.train.data.records import Record


def tokenize_prompts(records: Sequence[Record], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    r"""Token ids and attention mask of the prompts alone, padded on the left for generation.

    Args:
        records: The records; their answers are left out.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.

    Returns:
        Two int32 arrays (records, length), where length is a multiple of 32.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> ids, mask = tokenize_prompts([Record("Reverse.", "abc", "cba")], tokenizer)
        >>> tokenizer.decode(ids[0][mask[0] == 1]).endswith("### Response:\n")
        True
    """
    prompts = []
    for record in records:
        ids, _ = encode_completion(record.prompt, "", tokenizer)
        prompts.append(ids[:-1])  # without the end-of-sequence token
    length = rounded_up(max(map(len, prompts)))
    input_ids = np.full((len(prompts), length), tokenizer.eos_token_id, np.int32)
    attention_mask = np.zeros((len(prompts), length), np.int32)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
    return input_ids, attention_mask
