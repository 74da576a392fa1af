"""Output folders that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_used(output: Path) -> None:
    """Raise unless `output` is free, so that a command says so before it works for minutes.

    Raises:
        FileExistsError: If something other than an empty folder is there.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} already exists and is not an empty folder. Name another one with --output.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `output` to write into, and move it there if the block ends well.

    If the block raises, nothing is left, folders made above `output` included.

    Example:
        >>> with new_folder(Path("runs/first")) as folder:
        ...     (folder / "a.txt").write_text("hello")
        5
        >>> Path("runs/first/a.txt").read_text()
        'hello'
    """
    refuse_used(output)
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            folder = Path(scratch) / output.name
            folder.mkdir()
            yield folder
            if output.exists():
                output.rmdir()
            folder.rename(output)
    except BaseException:
        for parent in made:
            parent.rmdir()
        raise
