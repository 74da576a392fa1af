"""Words and their classes: names, token ids, and the labels of the tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.models.hf_config import numbered_labels
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.encode import IGNORE, Encoded, Example, kept, task_field
from peft_jax.train.data.label_kinds import check_numbers
from peft_jax.train.data.long_examples import Long, check_stride
from peft_jax.train.data.records import AnyRecord, Tagged, all_of
from peft_jax.train.data.token_rows import Watch, chunks


def tag_names(records: Sequence[AnyRecord]) -> dict[int, str]:
    """The names of the classes of words that occur, by number: in their order, or ``LABEL_0`` and so on for numbers.

    Raises:
        ValueError: If records have names and numbers, or are of another format.

    Example:
        >>> tag_names([Tagged(("Ada", "writes"), ("B-PER", "O"))])
        {0: 'B-PER', 1: 'O'}
    """
    names, numbers = set[str](), set[int]()
    for record in tagged(records):
        for tag in record.tags:
            if isinstance(tag, str):
                names.add(tag)
            else:
                numbers.add(tag)
    check_numbers(sorted(names), sorted(numbers))
    return dict(enumerate(sorted(names))) or numbered_labels(max(numbers) + 1)


def tagged(records: Sequence[AnyRecord]) -> list[Tagged]:
    """The records as what they are.

    Raises:
        ValueError: If one is of another format.
    """
    return all_of(records, Tagged, "A classifier of tokens learns")


def encode_tags(
    records: Sequence[AnyRecord],
    tokenizer: Tokenizer,
    *,
    cutoff_len: int,
    id2label: Mapping[int, str],
    tasks: int = 0,
    long: Long = "drop",
    stride: int | None = None,
    watch: Watch = iter,
) -> Encoded:
    """Tokenize words, with the class of a word at its first token.

    Other tokens, those that the tokenizer puts around a text too, have the label `IGNORE`. Tokens are those of the text
    in which single spaces stand between the words.

    Args:
        records: Words with their classes.
        tokenizer: A fast `transformers` tokenizer, which knows the word of each token.
        cutoff_len: The most tokens of a row.
        id2label: Names of the classes by number, from 0 on.
        tasks: As `peft_jax.train.data.encode` takes it.
        long: Whether longer texts are left out (``drop``), cut (``truncate``) or split into several rows (``split``),
            each with the special tokens around it.
        stride: How many tokens neighbouring rows of a text that is split share, which are labelled once; None for 0.
        watch: As `peft_jax.train.data.encode` takes it.

    Returns:
        The examples in the order of the records.

    Raises:
        ValueError: If the tokenizer does not know words, a record is of another format or has another class, or no
            example fits.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> record = Tagged(("List", "it"), ("verb", "noun"))
        >>> [example], _ = encode_tags([record], tokenizer, cutoff_len=32, id2label={0: "noun", 1: "verb"})
        >>> example.labels[example.labels != IGNORE].tolist()
        [1, 0]
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("classes of tokens need a fast tokenizer, which knows the word of each token. Save one.")
    found = tagged(records)
    numbers = {name: number for number, name in id2label.items()}
    spaced = _needs_spaces(tokenizer)
    shared = _checked(stride, long, tokenizer, cutoff_len)
    examples: list[Example] = []
    rows_of: list[int] = []
    too_long = shortened = 0
    for part in chunks(len(found), watch):
        texts = [_words(record.words, spaced) for record in found[part]]
        batch = _tokenize(
            texts, tokenizer, truncation=True, max_length=cutoff_len, stride=shared, return_overflowing_tokens=True
        )
        windows: list[list[int]] = [[] for _ in texts]
        for row, place in enumerate(batch["overflow_to_sample_mapping"]):
            windows[place].append(row)
        for place, rows in enumerate(windows):
            number = part.start + place
            labels = [_class_of(tag, numbers, id2label, number + 1) for tag in found[number].tags]
            is_long = len(rows) > 1
            if is_long and long == "drop":
                too_long += 1
                continue
            shortened += is_long
            more = task_field(found[number], number + 1, tasks)
            seen = -1
            for row in rows[:1] if long == "truncate" else rows:
                ids, words = batch["input_ids"][row], batch.word_ids(row)
                marked, seen = _first_tokens(words, labels, seen)
                examples.append(Example(np.asarray(ids, np.int32), marked, more))
                rows_of.append(number)
    if not examples:
        raise ValueError(
            f"none of {len(found)} examples fits into {cutoff_len} tokens. Raise cutoff_len, or give --long truncate."
        )
    whole = kept(examples, cutoff_len)
    return Encoded(whole.examples, too_long, shortened, tuple(rows_of))


def _checked(stride: int | None, long: Long, tokenizer: Tokenizer, cutoff_len: int) -> int:
    """The number of tokens that neighbouring windows share."""
    check_stride(stride, long)
    if stride is None:
        return 0
    if long != "split":
        raise ValueError("--stride is for several rows of a text, and --long truncate keeps one. Give --long split.")
    room = cutoff_len - len(_tokenize([[]], tokenizer)["input_ids"][0])
    if stride >= room:
        raise ValueError(f"stride is {stride}, and a row has {room} tokens of a text. Give a number below that.")
    return stride


def _first_tokens(words: Sequence[int | None], labels: Sequence[int], seen: int) -> tuple[np.ndarray, int]:
    """The class of each word at its first token, and the last word; those up to ``seen`` were in an earlier row."""
    marked = np.full(len(words), IGNORE, np.int32)
    for place, word in enumerate(words):
        if word is not None and word > seen:
            marked[place] = labels[word]
            seen = word
    return marked, seen


def _class_of(tag: str | int, numbers: Mapping[str, int], id2label: Mapping[int, str], record: int) -> int:
    found = numbers.get(tag, -1) if isinstance(tag, str) else tag
    if found not in id2label:
        known = ", ".join(id2label.values())
        raise ValueError(f"record {record} has the tag {tag!r}, and the model's are {known}.")
    return found


def _words(words: Sequence[str], spaced: bool) -> list[str]:
    """The words as the tokenizer takes them."""
    return [words[0], *(f" {word}" for word in words[1:])] if spaced else list(words)


def _needs_spaces(tokenizer: Tokenizer) -> bool:
    """Whether words become the tokens that they are in a text with the space before them alone, as of GPT-2."""
    [text] = _tokenize(["a a"], tokenizer, is_split_into_words=False)["input_ids"]
    [alone] = _tokenize([["a", "a"]], tokenizer)["input_ids"]
    [spaced] = _tokenize([["a", " a"]], tokenizer)["input_ids"]
    return bool(alone != text and spaced == text)


def _tokenize(texts: Sequence[Any], tokenizer: Tokenizer, **options: Any) -> Any:
    quick: Any = tokenizer
    given = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False, **options}
    return quick(list(texts), **given)
