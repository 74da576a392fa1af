"""The end of process 0, as the other processes of a run meet it.

Process 0 has the service by which all know each other. When it is killed, JAX's client in each other process logs a
fatal error, prints the stack of its C++ thread and aborts. Here that process ends with one line and exit status 2.
"""

import atexit
import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

FATAL = re.compile(rb"^F\d{4} .*JAX distributed service detected fatal errors", re.MULTILINE)
OWN = re.compile(rb"^peft-jax: error: .*\n", re.MULTILINE)  # the report of the main thread
STATUS = 2
GRACE = 2  # seconds in which the main thread may end by itself, below the 6 s that an abort is held up


@contextlib.contextmanager
def service_watched(line: str) -> Iterator[None]:
    """End this process with ``line`` on stderr and status 2 if JAX gives up the service, whatever its threads wait for.

    During the block what is written to stderr goes through a pipe, in which a thread looks for JAX's fatal error. From
    there on it lets nothing through but this package's own error. An abort is delayed meanwhile: the handler of SIGABRT
    is the C library's ``sleep``. It is called with the signal's number, 6, and so sleeps for 6 seconds. On Windows,
    which lacks these, JAX aborts.

    If the block raises an exception, all this stays until Python's exit handlers run: the service may be lost at any
    time.

    Args:
        line: The error where the main thread reports none.
    """
    if sys.platform == "win32":
        yield
        return
    stderr = os.dup(2)
    source, target = os.pipe()
    sys.stderr.flush()
    os.dup2(target, 2)
    os.close(target)
    pump = threading.Thread(target=_pump, args=(source, stderr, line.encode() + b"\n"), daemon=True)
    pump.start()
    before = _set_abort_handler(ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value)

    def end(file: int) -> None:
        sys.stderr.flush()
        os.dup2(file, 2)  # which closes the pipe, so that its reader ends
        pump.join(GRACE)  # not for ever: a child process may still hold the pipe

    try:
        yield
    except Exception:
        atexit.register(end, os.open(os.devnull, os.O_WRONLY))
        raise
    except BaseException:  # `run` ends the process at once
        end(stderr)
        raise
    end(stderr)
    _set_abort_handler(before)


def _set_abort_handler(handler: int | None) -> int | None:
    """Set the C function that an abort calls, and return the one before; None is the default."""
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    before: int | None = library.signal(int(signal.SIGABRT), handler)
    return before


def _pump(source: int, target: int, line: bytes) -> None:
    """Copy what comes through the pipe, up to JAX's fatal error; then end the process.

    The pipe is read to its end even where the target takes nothing more: who writes to a full pipe waits for ever.
    """
    rest = b""  # of a line
    is_reported = False
    while part := os.read(source, 2**16):
        text = rest + part
        found = FATAL.search(text)
        is_reported = is_reported or OWN.search(text) is not None
        if found is not None:
            _write(target, text[len(rest) : found.start()])
            if is_reported:
                time.sleep(GRACE)
            else:
                _write(target, _own_error(source) or line)
            os._exit(STATUS)
        _write(target, part)
        rest = text.rpartition(b"\n")[2]
    os.close(source)
    os.close(target)


def _own_error(source: int) -> bytes | None:
    """The error that the main thread reports meanwhile, if it does."""
    end = time.monotonic() + GRACE
    text = b""
    while select.select([source], [], [], max(0, end - time.monotonic()))[0]:
        text += os.read(source, 2**16)
        found = OWN.search(text)
        if found is not None:
            return found[0]
    return None


def _write(target: int, text: bytes) -> None:
    """Write a text whole, or as much of it as a target takes that is closed meanwhile."""
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(target, text) :]
