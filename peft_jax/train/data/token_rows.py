"""Texts as token ids: many at a time, and of long texts no more than is needed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.core.selecting import picked
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.text_pieces import PIECE, ids_of_pieces

CHUNK = 1024  # records that are tokenized at a time
LONG = 2 * PIECE  # characters of a text that is tokenized in pieces
CHARACTERS, MARGIN = 8, 64  # of a text per token that is asked for, and tokens behind them, where the cut is felt

# Wraps the starts of chunks, as a progress bar does.
Watch = Callable[[Sequence[int]], Iterable[int]]


class TokenRow(NamedTuple):
    """Token ids of a text, and whether they are those of the whole text."""

    ids: list[int]
    is_whole: bool


def token_rows(texts: Sequence[str], tokenizer: Tokenizer, at_least: int | None = None) -> list[TokenRow]:
    """Tokenize texts, with the special tokens that the tokenizer puts around a text.

    Args:
        texts: The texts.
        tokenizer: A `transformers` tokenizer; a fast one takes all texts at a time.
        at_least: How many tokens of each text are needed. Of a text with more, a part is tokenized, so that a book
            takes no longer than its first page. None for whole texts.

    Returns:
        A row for each text.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> whole, part = token_rows(["one", "one two three " * 10**5], tokenizer, at_least=10)
        >>> whole.is_whole, part.is_whole, len(part.ids) < 1000
        (True, False, True)
        >>> part.ids[:10] == tokenizer("one two three " * 10**5)["input_ids"][:10]
        True
    """
    rows: dict[int, TokenRow] = {}
    waiting = list(range(len(texts)))
    size = None if at_least is None else CHARACTERS * (at_least + MARGIN)
    while waiting:
        parts = [texts[number][:size] for number in waiting]
        short = []
        for number, ids in zip(waiting, _tokenize(parts, tokenizer), strict=True):
            is_whole = size is None or len(texts[number]) <= size
            if is_whole or at_least is None or len(ids) >= at_least + MARGIN:
                rows[number] = TokenRow(ids, is_whole)
            else:  # long tokens, or white space that the tokenizer drops
                short.append(number)
        waiting = short
        size = None if size is None else size * 4
    return [rows[number] for number in range(len(texts))]


def _tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    rows: dict[int, list[int]] = {}
    for number, text in enumerate(texts):
        if len(text) > LONG and (ids := ids_of_pieces(text, tokenizer)) is not None:
            rows[number] = ids
    others = [number for number in range(len(texts)) if number not in rows]
    if others:
        quick: Any = tokenizer
        some = list(picked(texts, others))
        found = quick(some, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        rows |= zip(others, found["input_ids"], strict=True)
    return [rows[number] for number in range(len(texts))]


def paired_rows(
    texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, **options: Any
) -> list[Mapping[str, list[int]]]:
    """Tokenize texts, and pairs of texts, with what the tokenizer puts around them.

    Args:
        texts: Tuples of a text or two.
        tokenizer: A `transformers` tokenizer; a fast one takes all texts at a time.
        **options: Those of the tokenizer.

    Returns:
        ``input_ids`` and what else the options ask for, of each tuple.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> one, pair = paired_rows([("a b",), ("a b", "c")], tokenizer)
        >>> pair["input_ids"] == tokenizer("a b", "c")["input_ids"]
        True
    """
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer(*text, verbose=False, **options) for text in texts]
    quick: Any = tokenizer
    rows: dict[int, Mapping[str, list[int]]] = {}
    places_by_count: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        places_by_count.setdefault(len(text), []).append(place)
    for places in places_by_count.values():
        columns = map(list, zip(*picked(texts, places), strict=True))
        found = quick(*columns, return_attention_mask=False, verbose=False, **options)
        for number, place in enumerate(places):
            rows[place] = {name: values[number] for name, values in found.items()}
    return [rows[place] for place in range(len(texts))]


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items, ids or characters, two sequences begin with in common.

    Example:
        >>> common_start("one two", "one three")
        5
    """
    if other[: len(one)] == one:
        return len(one)
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def chunks(count: int, watch: Watch = iter) -> Iterable[slice]:
    """Slices of `CHUNK` records each.

    Example:
        >>> list(chunks(1500))
        [slice(0, 1024, None), slice(1024, 2048, None)]
    """
    for start in watch(range(0, count, CHUNK)):
        yield slice(start, start + CHUNK)
