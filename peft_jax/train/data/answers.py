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
from peft_jax.train.data.long_examples import Long, check_not_split
from peft_jax.train.data.records import (
    AnyRecord,
    Chat,
    Completion,
    Record,
    named,
)
from peft_jax.train.data.template import TEMPLATES, Layout
from peft_jax.train.data.token_rows import Watch, chunks, token_rows


def encode_answers(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    start_token_id: int,
    template: Layout = TEMPLATES["short"],
    tasks: int = 0,
    long: Long = "drop",
    watch: Watch = iter,
) -> Encoded:
    """Tokenize records for an encoder-decoder.

    Prompts and answers are tokenized apart, each with what the tokenizer puts around a text; answers end with the
    end-of-sequence token, and all of their tokens are trained.

    Args:
        records: Alpaca's, or prompts with completions.
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        cutoff_len: The most tokens of a prompt, and of an answer.
        start_token_id: The first of the decoder's inputs, the config's ``decoder_start_token_id``.
        template: Lays out alpaca's fields.
        tasks: As `peft_jax.train.data.encode` takes it.
        long: Whether examples with a longer prompt or answer are left out (``drop``) or cut (``truncate``): a prompt as
            the tokenizer cuts it, with the special tokens around it, and an answer behind its first tokens.
        watch: As `peft_jax.train.data.encode` takes it.

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
    check_not_split(long, "an encoder-decoder")
    texts = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Record | Completion):
            raise ValueError(
                f"record {number} has {named(type(record))}. An encoder-decoder learns from "
                f"{named(Record, Completion)}."
            )
        laid_out = template(record) if isinstance(record, Record) else record
        if isinstance(laid_out, Chat):
            raise ValueError("an encoder-decoder learns no chats. Give another template than that of chats.")
        texts.append(laid_out)
    examples: list[Example] = []
    shortened = 0
    for part in chunks(len(records), watch):
        prompts = token_rows([text.prompt for text in texts[part]], tokenizer)
        answers = token_rows([text.completion for text in texts[part]], tokenizer)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), part.start + 1):
            ids, labels = prompt.ids, answer.ids
            if not labels or labels[-1] != tokenizer.eos_token_id:
                labels.append(tokenizer.eos_token_id)
            if long == "truncate" and max(len(ids), len(labels)) > cutoff_len:
                cut = tokenizer(texts[number - 1].prompt, truncation=True, max_length=cutoff_len, verbose=False)
                ids, labels = cut["input_ids"], labels[:cutoff_len]
                shortened += 1
            more = task_field(records[number - 1], number, tasks)
            more["decoder_input_ids"] = np.asarray([start_token_id, *labels[:-1]], np.int32)
            examples.append(Example(np.asarray(ids, np.int32), np.asarray(labels, np.int32), more))
    return kept(examples, cutoff_len, long, shortened)
