"""Errors about files from elsewhere: none is longer than a screen, however long the value is that it names."""

import contextlib
from collections.abc import Iterator

LONGEST = 1200  # characters of a message; three in four are of its start


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
