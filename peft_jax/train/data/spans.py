"""Questions and texts that answer them: token ids in overlapping windows, and the places of the answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.long_examples import Encoded, Example, Long, Window, check_stride
from peft_jax.train.data.records import AnyRecord, Question, all_of
from peft_jax.train.data.token_rows import Watch, chunks

STRIDE = 128  # tokens that neighbouring windows share, where a quarter of a window is not less


def questions(records: Sequence[AnyRecord]) -> list[Question]:
    """The records as what they are.

    Raises:
        ValueError: If one is of another format.
    """
    return all_of(records, Question, "Spans are learned")


def encode_spans(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    token_types: bool = False,
    long: Long = "truncate",
    stride: int | None = None,
    watch: Watch = iter,
) -> Encoded:
    """Tokenize questions with their texts, and find the first and the last token of the first answer of each.

    A text that is too long is read in overlapping windows. A window without the whole answer is learned as one without
    an answer, whose place is that of the CLS token, as in transformers' example for SQuAD.

    Args:
        records: Questions, texts and answers.
        tokenizer: A fast `transformers` tokenizer, which knows the characters of each token.
        cutoff_len: The most tokens of a row.
        token_types: Whether the model distinguishes question and text by ``token_type_ids``.
        long: ``drop`` leaves questions out whose texts are too long; they are read in windows otherwise.
        stride: How many tokens of the text neighbouring windows share; None for 128, or a quarter of a row if that is
            less.
        watch: As `peft_jax.train.data.encode` takes it.

    Returns:
        The examples in the order of the records; ``labels`` are the places of first tokens, of shape (), and ``ends``
        beside them those of last ones. A question that leaves no room for its text is left out.

    Raises:
        ValueError: If the tokenizer does not know characters, a record is of another format, or no example fits.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> record = Question("Who?", "List it.", (("it", 5),))
        >>> [example], _ = encode_spans([record], tokenizer, cutoff_len=32)
        >>> tokenizer.decode(example.input_ids[int(example.labels) : int(example.more["ends"]) + 1]).strip()
        'it'
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("spans need a fast tokenizer, which knows the characters of each token. Save one.")
    found = questions(records)
    quick: Any = tokenizer
    check_stride(stride, long)
    if stride is not None and stride >= cutoff_len:
        raise ValueError(f"stride is {stride}, and a row has {cutoff_len} tokens in all. Give a smaller one.")
    if stride is None:
        stride = min(STRIDE, cutoff_len // 4)
    examples: list[Example] = []
    windows: list[Window] = []
    too_long = shortened = 0
    for part in chunks(len(found), watch):
        for number, record in enumerate(found[part], part.start):
            alone = quick(record.question, "", verbose=False)["input_ids"]
            if len(alone) + stride >= cutoff_len:
                too_long += 1
                continue
            rows = quick(
                *(record.question, record.context),
                truncation="only_second",
                max_length=cutoff_len,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_token_type_ids=token_types,
            )
            count = len(rows["input_ids"])
            if count > 1 and long == "drop":
                too_long += 1
                continue
            shortened += count > 1
            for row in range(count):
                ids = np.asarray(rows["input_ids"][row], np.int32)
                in_text = np.array([sequence == 1 for sequence in rows.sequence_ids(row)])
                places = np.where(in_text[:, None], np.asarray(rows["offset_mapping"][row]), -1)
                null = _null(ids, tokenizer)
                start, end = _ends(record, places, null)
                more = {"ends": np.asarray(end, np.int32), "windows": np.asarray(len(windows), np.int32)}
                if token_types:
                    more["token_type_ids"] = np.asarray(rows["token_type_ids"][row], np.int32)
                examples.append(Example(ids, np.asarray(start, np.int32), more))
                windows.append(Window(number, places, null))
    if not examples:
        raise ValueError(
            f"none of {len(found)} examples fits into {cutoff_len} tokens with a stride of {stride}. "
            "Raise cutoff_len, or give a smaller stride."
        )
    return Encoded(examples, too_long, shortened, tuple(window.record for window in windows), tuple(windows))


def _null(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """The place of the token that stands for no answer: CLS, else BOS, else the first one."""
    for name in ("cls_token_id", "bos_token_id"):
        found = np.flatnonzero(ids == getattr(tokenizer, name, None))
        if found.size:
            return int(found[0])
    return 0


def _ends(record: Question, places: np.ndarray, null: int) -> tuple[int, int]:
    """The first and the last token of the first answer, if the window has it whole."""
    if not record.answers:
        return null, null
    text, first = record.answers[0]
    last = first + len(text)
    in_text = np.flatnonzero(places[:, 0] >= 0)
    if not in_text.size or places[in_text[0], 0] > first or places[in_text[-1], 1] < last:
        return null, null
    start = in_text[places[in_text, 0] <= first][-1]
    end = in_text[places[in_text, 1] >= last][0]
    return int(start), int(end)
