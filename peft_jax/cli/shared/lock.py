"""Exclusive use of an output folder: a file lock of the operating system, which ends with the process that holds it."""

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
BEYOND = 2**30  # Windows keeps others from reading a locked byte, so the one that is locked is far behind the text


@contextmanager
def locked(file: Path, folder: Path) -> Iterator[bool]:
    """Hold a lock on a small file during the block, which says who holds it; the file is removed afterwards.

    A process that is killed leaves the file, which is then not locked. If the block raises over a file that was left,
    the file stays, as it still marks what that process left.

    Args:
        file: The file, in a folder that exists.
        folder: The folder that is protected, for messages.

    Yields:
        Whether an earlier process that was killed left the file.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the file cannot be written.
    """
    handle = _open_locked(file, folder)
    stays = False
    try:
        left = os.fstat(handle).st_size > 0
        try:
            os.ftruncate(handle, 0)
            os.write(handle, _me().encode())
        except OSError as error:
            raise unwritable(folder, error.strerror or str(error)) from error
        try:
            yield left
        except BaseException:
            stays = left
            raise
    finally:
        if sys.platform == "win32":  # which removes no open file
            os.close(handle)
            if not stays:
                file.unlink(missing_ok=True)
        else:
            if not stays and _is_open_as(handle, file):
                file.unlink()
            os.close(handle)


def _open_locked(file: Path, folder: Path) -> int:
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(folder, error.strerror or str(error)) from error
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in HELD:
                os.close(handle)
                raise BlockingIOError(
                    f"{folder} is in use by {_holder(file)}. Wait for its end or stop it, or name another folder with "
                    "--output."
                ) from error
            print(
                f"peft-jax: the file system of {folder} has no locks ({error.strerror}), so nothing keeps a second "
                "command from writing to that folder. Start none.",
                file=sys.stderr,
            )
        if _is_open_as(handle, file):  # otherwise its holder has just removed it
            return handle
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if sys.platform == "win32":
        os.lseek(handle, BEYOND, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_open_as(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _me() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def _holder(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    return text or "another process, which has not written its number yet"


def unwritable(output: Path, reason: str) -> OSError:
    """The error for an output folder that cannot be written, and why not."""
    return OSError(f"{output} cannot be written: {reason}. Name another one with --output.")
