"""Errors about files from elsewhere: none is longer than a screen, however long the value is that it names."""

import contextlib
from collections.abc import Iterator

START, END = 900, 300  # characters of a longer message that are kept


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Cut out the middle of long messages of the errors that the block raises; the way out stands at their end.

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
            error.args = (shortened(str(error)),)
        raise


def shortened(text: str) -> str:
    """A text without its middle, if it is long.

    Example:
        >>> shortened("short")
        'short'
    """
    if len(text) <= START + END:
        return text
    return f"{text[:START]} ... {text[-END:]}"
