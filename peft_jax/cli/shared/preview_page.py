"""Examples of training data as a text for a terminal, and as a page of HTML: what is learned stands out."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from peft_jax.cli.shared.terminal import escaped

LEARNED, GIVEN, PLAIN = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"  # black on green, faint, and neither

STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1em; border-radius: 6px }
span { color: #777; border-right: 1px solid #ddd } span.learned { color: #000; background: #b7e4b7 }
"""


class Part(NamedTuple):
    """The text of a token, and whether it is learned; None for what is no token."""

    text: str
    is_learned: bool | None


class Shown(NamedTuple):
    """An example: its tokens, and its class, if it has one."""

    parts: Sequence[Part]
    label: str | None = None

    @property
    def title(self) -> str:
        """Its counts."""
        tokens = [part for part in self.parts if part.is_learned is not None]
        if self.label is not None:
            return f"{len(tokens)} tokens, class {self.label}"
        return f"{len(tokens)} tokens, {sum(part.is_learned or False for part in tokens)} learned"


def painted(examples: Sequence[Shown], *, colored: bool) -> str:
    """Examples for a terminal; without colors what is learned stands in double brackets.

    Example:
        >>> print(painted([Shown([Part("1, 2,", False), Part(" 3", True)])], colored=False))
        Example 1: 2 tokens, 1 learned
        1, 2,[[ 3]]
        <BLANKLINE>
    """
    lines = []
    for number, example in enumerate(examples, 1):
        lines += [f"Example {number}: {escaped(example.title)}", _colored(example) if colored else _marked(example), ""]
    return "\n".join(lines)


def _colored(example: Shown) -> str:
    pieces = []
    for part in example.parts:
        code = LEARNED if part.is_learned else GIVEN
        # A terminal would paint a line break to the end of the line.
        lines = [f"{code}{line}{PLAIN}" if line else "" for line in escaped(part.text).split("\n")]
        pieces.append("\n".join(lines))
    return "".join(pieces)


def _marked(example: Shown) -> str:
    pieces = []
    was_learned = False
    for part in (*example.parts, Part("", None)):
        is_learned = bool(part.is_learned)
        if is_learned != was_learned:
            pieces.append("[[" if is_learned else "]]")
        pieces.append(escaped(part.text))
        was_learned = is_learned
    return "".join(pieces)


def page(examples: Sequence[Shown], said: Sequence[str]) -> str:
    """Examples as a page of HTML that needs no other file.

    Example:
        >>> "<span class=learned> &lt;3</span>" in page([Shown([Part("1, 2,", False), Part(" <3", True)])], [])
        True
    """
    lines = ["<!doctype html>", '<meta charset="utf-8">', "<title>Preview of training data</title>"]
    lines += [f"<style>{STYLE}</style>", "<h1>Preview of training data</h1>"]
    lines += [f"<p>{html.escape(sentence)}</p>" for sentence in said]
    lines.append("<p>Green tokens are learned; the others are given.</p>")
    for number, example in enumerate(examples, 1):
        lines.append(f"<h2>Example {number}: {html.escape(example.title)}</h2>")
        spans = "".join(_span(part) for part in example.parts)
        lines.append(f"<pre>{spans}</pre>")
    return "\n".join(lines) + "\n"


def _span(part: Part) -> str:
    text = html.escape(escaped(part.text))
    if part.is_learned is None:
        return text
    return f"<span class=learned>{text}</span>" if part.is_learned else f"<span>{text}</span>"
