"""Token ids of a long text, from pieces that overlap: a tokenizer takes some 120 bytes for each character at once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from peft_jax.prompts.tokenizer import Tokenizer

PIECE, OVERLAP = 2**17, 2**12  # characters of a piece, and those that it shares with each neighbour
AT_ONCE = 8  # pieces, which a fast tokenizer takes in parallel
AGREED = 16  # tokens before a seam, and behind it, that both pieces must have alike


class Token(NamedTuple):
    """A token and the characters of the whole text that it is of."""

    id: int
    first: int
    end: int


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        start: The place of its first character in the text.
        ids: The ids of its tokens.
        encoding: The places of its tokens, as the tokenizer gives them.
    """

    start: int
    ids: Sequence[int]
    encoding: Any

    def tokens(self, first: int, end: int) -> list[Token]:
        """The tokens from one number to another."""
        found = []
        for number in range(first, end):
            places = self.encoding.token_to_chars(number) or (0, 0)
            found.append(Token(self.ids[number], self.start + places[0], self.start + places[1]))
        return found

    def token_at(self, place: int) -> int:
        """The number of the first token at or behind a character of the text."""
        for character in range(place - self.start, place - self.start + OVERLAP):
            found: int | None = self.encoding.char_to_token(character)
            if found is not None:
                return found
        return len(self.ids)


def ids_of_pieces(text: str, tokenizer: Tokenizer) -> list[int] | None:
    """Tokenize a text in pieces, as if it were tokenized whole.

    Neighbours share characters, and are joined between two tokens that both have, with the same `AGREED` tokens on
    either side. A tokenizer that merges by rank never looks past a boundary that it leaves.

    Returns:
        The ids, with the special tokens that the tokenizer puts around a text; None if two pieces do not agree
        anywhere, as in a word of a hundred thousand letters, or if the special tokens cannot be told from the others.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from peft_jax.cli.demo_data import MODEL
        >>> tokenizer = AutoTokenizer.from_pretrained(MODEL)
        >>> ids_of_pieces("one two three " * 20_000, tokenizer) == tokenizer("one two three " * 20_000)["input_ids"]
        True
    """
    around = _special_tokens(text[:OVERLAP], tokenizer)
    if around is None:
        return None
    ids: list[int] = []
    before: Piece | None = None
    begin = 0
    for piece in _pieces(text, tokenizer):
        if before is not None:
            seam = _seam(before, piece)
            if seam is None:
                return None
            ids += before.ids[begin : seam[0]]
            begin = seam[1]
        before = piece
    if before is not None:
        ids += before.ids[begin:]
    return [*around[0], *ids, *around[1]]


def _pieces(text: str, tokenizer: Any) -> Iterator[Piece]:
    starts = range(0, len(text), PIECE)
    for number in range(0, len(starts), AT_ONCE):
        some = [max(0, start - OVERLAP) for start in starts[number : number + AT_ONCE]]
        parts = [text[start : start + PIECE + 2 * OVERLAP] for start in some]
        found = tokenizer(parts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for place, start in enumerate(some):
            yield Piece(start, found["input_ids"][place], found.encodings[place])


def _seam(one: Piece, other: Piece) -> tuple[int, int] | None:
    """Numbers of tokens of two neighbours: the first one's end, and the second one's beginning."""
    middle = other.start + OVERLAP
    first = max(0, one.token_at(middle - OVERLAP // 2))
    left = one.tokens(first, min(len(one.ids), one.token_at(middle + OVERLAP // 2)))
    second = other.token_at(middle - OVERLAP // 2)
    right = other.tokens(second, min(len(other.ids), other.token_at(middle + OVERLAP // 2)))
    number_at = {token.first: number for number, token in reversed(list(enumerate(right)))}
    for number in range(AGREED, len(left) - AGREED):
        place = number_at.get(left[number].first)
        if place is None or place < AGREED or left[number - 1].end > left[number].first:
            continue  # tokens of one character's bytes have its place, all of them
        if left[number - AGREED : number + AGREED] == right[place - AGREED : place + AGREED]:
            return first + number, second + place
    return None


def _special_tokens(sample: str, tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The special tokens that the tokenizer puts before a text, and those behind it."""
    plain = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
    if not plain:
        return None
    whole = tokenizer(sample, verbose=False)["input_ids"]
    for before in range(len(whole) - len(plain) + 1):
        if whole[before : before + len(plain)] == plain:
            return whole[:before], whole[before + len(plain) :]
    return None
