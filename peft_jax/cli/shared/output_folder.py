"""Output folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peft_jax.cli.shared.lock import locked, unwritable

LOCK = ".peft-jax-lock"
UNFINISHED = ".peft-jax-part"


def refuse_used(output: Path, own: Collection[str] = ()) -> None:
    """Raise unless `output` is free and can be made, so that a command says so before it works for minutes.

    Args:
        output: The folder.
        own: Names of what may be in it.

    Raises:
        FileExistsError: If something other than an empty folder is there.
        OSError: If the folder that it would be in is a file, or may not be written to.
    """
    if output.is_dir():
        found = sorted(entry.name for entry in output.iterdir() if entry.name not in own)
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
    processes from making the same folder meanwhile. The hidden folder of a process that was killed is removed.

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
    hidden = "" if empty else f".{output.name}"
    lock, unfinished = f"{hidden}{LOCK}", f"{hidden}{UNFINISHED}"
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        _make(output, place)
        with locked(place / lock, output):
            refuse_used(output, (lock, unfinished))  # another process may have made it meanwhile
            with _hidden(place / unfinished, output) as folder:
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
def _hidden(unfinished: Path, output: Path) -> Iterator[Path]:
    """A folder inside a hidden one, since the hidden one is for its owner's eyes alone."""
    with ExitStack() as made:
        try:
            made.enter_context(made_anew(unfinished))
        except OSError as error:
            raise unwritable(output, error.strerror or str(error)) from error
        folder = unfinished / "out"
        folder.mkdir()
        yield folder


@contextmanager
def made_anew(folder: Path) -> Iterator[None]:
    """Make an empty folder for the block, and remove it; what a killed process left there is removed first.

    Example:
        >>> with made_anew(Path("parts")):
        ...     (Path("parts") / "a.txt").write_text("hello")
        5
        >>> Path("parts").exists()
        False
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
