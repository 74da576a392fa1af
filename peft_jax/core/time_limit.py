"""A limit of time for programs that come with a file, such as chat templates."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

TEMPLATE_SECONDS = 10  # that a chat template may take for one conversation


class TooLongError(RuntimeError):
    """A block took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLongError in a block of Python code that takes longer than this, in whatever thread it runs.

    A single operation of the interpreter, such as a power of large numbers, is not cut short.

    Example:
        >>> with time_limit(5):
        ...     sum(range(10))
        45
    """
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _Stopped:
        raise TooLongError(f"it takes longer than {seconds:g} s") from None
    finally:
        with lock:
            is_over = True
        timer.cancel()


class _Stopped(Exception):
    """The exception that a timer raises within the block."""
