"""A watchdog for one input."""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator
from types import FrameType

LATEST = 10  # seconds of the processor for one input; others share the machine


class Late(BaseException):
    """An input that took too long."""


def on_alarm(number: int, frame: FrameType | None) -> None:
    """Raise Late where the program is."""
    raise Late


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """End a block that takes longer than `LATEST`: by an exception, and by the process's end where that is not seen."""
    before = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, LATEST)
    faulthandler.dump_traceback_later(6 * LATEST, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)
