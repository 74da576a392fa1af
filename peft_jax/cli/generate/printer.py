"""Prints one answer while its tokens are generated."""

import sys
from typing import TextIO

import numpy as np

from peft_jax.prompts.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # a tokenizer's text for bytes that are no whole character yet


class Printer:
    """A streamer for `generate` that prints the text of one row, never half a character.

    Example:
        >>> import io
        >>> class Bytes:
        ...     def decode(self, tokens, **options):
        ...         return bytes(tokens).decode(errors="replace")
        >>> printer = Printer(Bytes(), io.StringIO())
        >>> for byte in "né".encode():
        ...     printer.put(np.array([byte]))
        ...     printer.file.getvalue()
        'n'
        'n'
        'né'
    """

    def __init__(self, tokenizer: Tokenizer, file: TextIO | None = None) -> None:
        self.tokenizer, self.file = tokenizer, file or sys.stdout
        self.tokens, self.printed = list[int](), ""

    def put(self, value: np.ndarray) -> None:
        """Take the prompt (1, length), which is not printed, then tokens (1,)."""
        if value.ndim == 1:
            self.tokens += value.tolist()
            self._print(text_of(self.tokens, self.tokenizer).rstrip(UNFINISHED))

    def end(self) -> None:
        """Print the rest of the text, a cut character too, and end the line."""
        self._print(text_of(self.tokens, self.tokenizer))
        print(flush=True, file=self.file)

    def _print(self, text: str) -> None:
        new = text[len(self.printed) :]
        if new:
            print(new, end="", flush=True, file=self.file)
            self.printed += new


def text_of(tokens: list[int], tokenizer: Tokenizer) -> str:
    """The text of an answer without its special tokens."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
