"""Output folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_used(output: Path) -> None:
    """Raise unless `output` is free and can be made, so that a command says so before it works for minutes.

    Raises:
        FileExistsError: If something other than an empty folder is there.
        OSError: If the folder that it would be in is a file, or may not be written to.
    """
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} already exists and is not an empty folder. Name another one with --output.")
    there = next(place for place in (output, *output.parents) if os.path.lexists(place))
    if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
        raise unwritable(output, f"{there} is not a folder that you may write to")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, and put what it holds in place if the block ends well.

    It lies beside `output`, or inside where `output` is an empty folder, which may be a link, a mounted volume or the
    current folder. If the block raises, nothing is left, folders made above `output` included.

    Raises:
        OSError: As `refuse_used`.

    Example:
        >>> with new_folder(Path("runs/first")) as folder:
        ...     (folder / "a.txt").write_text("hello")
        5
        >>> Path("runs/first/a.txt").read_text()
        'hello'
    """
    refuse_used(output)
    empty = output.is_dir()
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        with _hidden(output, output if empty else output.parent) as folder:
            yield folder
            if empty:
                for entry in folder.iterdir():
                    entry.rename(output / entry.name)
            else:
                folder.rename(output)
    except BaseException:
        for parent in made:
            if parent.exists():
                parent.rmdir()
        raise


@contextmanager
def _hidden(output: Path, place: Path) -> Iterator[Path]:
    """A folder inside a hidden one in `place`, since the hidden one is for its owner's eyes alone."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=place)
    except OSError as error:
        raise unwritable(output, error.strerror or str(error)) from error
    with scratch:
        folder = Path(scratch.name) / "out"
        folder.mkdir()
        yield folder


def unwritable(output: Path, reason: str) -> OSError:
    """The error for an output folder that cannot be written, and why not."""
    return OSError(f"{output} cannot be written: {reason}. Name another one with --output.")
