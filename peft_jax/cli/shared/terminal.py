r"""Output of the commands, with control characters of names, fields and texts escaped.

A terminal obeys such characters: an escape sequence in the name of a folder could hide or forge lines. Everything that
a command prints is escaped, whoever wrote it and wherever it goes, with one exception: texts that a model generates
are data, and reach a pipe or a file as they are.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# C0, DEL and C1 without tab and newline; marks, embeddings, overrides and isolates of bidirectional text; line and
# paragraph separators; halves of surrogate pairs, which are the bytes of a path that are not UTF-8.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    r"""A text whose control characters are spelled out; tabs and newlines stay.

    Example:
        >>> escaped("red \x1b[31m\n")
        'red \\x1b[31m\n'
    """
    return CONTROLS.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 0x7F:
        return "\\u007f"  # the only one in what json.dumps writes, and so it stays JSON
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def in_one_line(text: str) -> str:
    r"""As `escaped`, with tabs and newlines spelled out too.

    Example:
        >>> in_one_line("a\nb")
        'a\\nb'
    """
    return escaped(text).replace("\t", "\\t").replace("\n", "\\n")


class Escaping:
    """A text stream that escapes what is written; all else is the stream's own.

    Args:
        stream: Where it goes.
        rewrites_lines: Whether carriage returns pass, which a progress bar needs.
    """

    def __init__(self, stream: TextIO, *, rewrites_lines: bool = False) -> None:
        self.stream, self._rewrites_lines = stream, rewrites_lines

    def write(self, text: str) -> int:
        """Write a text, escaped."""
        if self._rewrites_lines:
            return self.stream.write("\r".join(escaped(part) for part in text.split("\r")))
        return self.stream.write(escaped(text))

    def writelines(self, lines: list[str]) -> None:
        """Write texts, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is printed or logged in the block, on stdout and stderr."""
    out, errors = Escaping(sys.stdout), Escaping(sys.stderr, rewrites_lines=True)
    with contextlib.ExitStack() as stack:
        for handler in _handlers_of(sys.stderr):
            stack.callback(handler.setStream, handler.stream)
            handler.setStream(errors)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(errors))
        yield


def _handlers_of(stream: TextIO) -> list[Any]:
    """The handlers that log to a stream: transformers' took hold of it when it was imported."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [one for one in handlers if isinstance(one, logging.StreamHandler) and one.stream is stream]


def verbatim() -> TextIO:
    """Standard output for a text that is data: as it is into a pipe or a file, escaped on a terminal."""
    if isinstance(sys.stdout, Escaping) and not sys.stdout.isatty():
        return sys.stdout.stream
    return sys.stdout


def obeyed() -> TextIO:
    """Standard output for a text whose codes a terminal is to obey; whoever writes it has escaped the rest of it."""
    return sys.stdout.stream if isinstance(sys.stdout, Escaping) else sys.stdout


def escape_tracebacks() -> None:
    """Escape what Python itself prints when the process ends."""
    sys.stderr = cast(TextIO, Escaping(sys.stderr, rewrites_lines=True))
