"""Errors about files from elsewhere: one line, none longer than a screen, whatever the value is that it names."""

import contextlib
from collections.abc import Iterator

BREAKS = {ord(mark): repr(mark)[1:-1] for mark in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}
LONGEST = 1200  # characters of a message; three in four are of its start


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Make the messages of the errors that the block raises one line, and cut out the middle of long ones.

    The way out stands at their end.

    Example:
        >>> try:
        ...     with short_errors():
        ...         raise ValueError("a" * 10**6 + " is no rank. Write a number.")
        ... except ValueError as error:
        ...     print(len(str(error)), str(error)[-16:])
        1205 Write a number.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if len(error.args) == 1:  # OSErrors of the system have several
            error.args = (shortened(in_one_line(str(error))),)
        raise


def in_one_line(text: str) -> str:
    r"""A text in which characters that break a line are written as Python writes them.

    Example:
        >>> print(in_one_line("it has in\rput"))
        it has in\rput
    """
    return text.translate(BREAKS)


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it is long.

    Args:
        text: The text.
        longest: How many of its characters are kept.

    Example:
        >>> shortened("short")
        'short'
    """
    if len(text) <= longest:
        return text
    end = longest // 4
    return f"{text[: longest - end]} ... {text[-end:]}"
