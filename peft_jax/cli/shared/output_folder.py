"""Output folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_jax.cli.shared.lock import locked, unwritable

LOCK = ".peft-jax-lock"


def refuse_used(output: Path, own: str | None = None) -> None:
    """Raise unless `output` is free and can be made, so that a command says so before it works for minutes.

    Args:
        output: The folder.
        own: Name of the one file that may be in it.

    Raises:
        FileExistsError: If something other than an empty folder is there.
        OSError: If the folder that it would be in is a file, or may not be written to.
    """
    if output.is_dir():
        found = sorted(entry.name for entry in output.iterdir() if entry.name != own)
        if found:
            raise FileExistsError(
                f"{output} already exists and is not an empty folder (it holds {found[0]}). Name another one with "
                "--output."
            )
    elif os.path.lexists(output):
        raise FileExistsError(f"{output} already exists and is not an empty folder. Name another one with --output.")
    there = next(place for place in (output, *output.parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise unwritable(output, f"{there} is not a folder that you may write to")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, and put what it holds in place if the block ends well.

    It is beside `output`, or inside where `output` is an empty folder, which may be a link, a mounted volume or the
    current folder. If the block raises, nothing is left, folders made above `output` included. A lock keeps other
    processes from making the same folder meanwhile.

    Raises:
        BlockingIOError: If another process is making the folder.
        OSError: As `refuse_used`.

    Example:
        >>> with new_folder(Path("runs/first")) as folder:
        ...     (folder / "a.txt").write_text("hello")
        5
        >>> Path("runs/first/a.txt").read_text()
        'hello'
    """
    if not os.path.lexists(output / LOCK):  # where there is one, whether it is held says more
        refuse_used(output)
    empty = output.is_dir()
    place = output if empty else output.parent
    lock = LOCK if empty else f".{output.name}{LOCK}"
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        _make(output, place)
        with locked(place / lock, output):
            refuse_used(output, lock)  # another process may have made it meanwhile
            with _hidden(output, place) as folder:
                yield folder
                if empty:
                    for entry in folder.iterdir():
                        entry.rename(output / entry.name)
                else:
                    refuse_used(output)
                    folder.rename(output)
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _make(output: Path, place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(output, error.strerror or str(error)) from error


@contextmanager
def _hidden(output: Path, place: Path) -> Iterator[Path]:
    """A folder inside a hidden one in `place`, since the hidden one is for its owner's eyes alone."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=place)
    except OSError as error:
        raise unwritable(output, error.strerror or str(error)) from error
    with scratch:
        folder = Path(scratch.name) / "out"
        folder.mkdir()
        yield folder
