"""Records for an encoder-decoder: the encoder reads the prompt, the decoder learns the answer."""

from collections.abc import Sequence

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.encode import (
    Encoded,
    Example,
    check_eos,
    kept,
    task_field,
)
from peft_jax.train.data.records import (
    AnyRecord,
    Chat,
    Completion,
    Record,
    named,
)
from peft_jax.train.data.template import TEMPLATES, Layout


def encode_answers(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    start_token_id: int,
    template: Layout = TEMPLATES["short"],
    tasks: int = 0,
) -> Encoded:
    """Tokenize records for an encoder-decoder.

    Prompts and answers are tokenized apart, each with what the tokenizer puts around a text; answers end with the
    end-of-sequence token, and all of their tokens are trained.

    Args:
        records: Alpaca's, or prompts with completions.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        cutoff_len: Examples whose prompt or answer has more tokens are left out and counted.
        start_token_id: The first of the decoder's inputs, the config's ``decoder_start_token_id``.
        template: Lays out alpaca's fields.
        tasks: As `peft_jax.train.data.encode` takes it.

    Returns:
        The examples in the order of the records, with ``decoder_input_ids``: the labels behind the start token.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, a record is of another format or names no task where
            it has to, or no example fits.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> [example], _ = encode_answers([Completion("1, 2,", "3")], tokenizer, cutoff_len=32, start_token_id=0)
        >>> tokenizer.decode(example.labels), example.more["decoder_input_ids"].tolist()[0]
        ('<|bos|>3<|eos|>', 0)
    """
    check_eos(tokenizer)
    examples = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Record | Completion):
            raise ValueError(
                f"record {number} has {named(type(record))}. An encoder-decoder learns from "
                f"{named(Record, Completion)}."
            )
        laid_out = template(record) if isinstance(record, Record) else record
        if isinstance(laid_out, Chat):
            raise ValueError("an encoder-decoder learns no chats. Give another template than that of chats.")
        prompt = list(tokenizer(laid_out.prompt, verbose=False)["input_ids"])
        answer = list(tokenizer(laid_out.completion, verbose=False)["input_ids"])
        if not answer or answer[-1] != tokenizer.eos_token_id:
            answer.append(tokenizer.eos_token_id)
        ids, labels, shifted = (np.asarray(row, np.int32) for row in (prompt, answer, [start_token_id, *answer[:-1]]))
        examples.append(Example(ids, labels, {"decoder_input_ids": shifted, **task_field(record, number, tasks)}))
    return kept(examples, cutoff_len)
