"""Compiled programs are kept in a folder, so that the next start of a command need not compile them again.

JAX itself reads and writes the folder: an entry is found by the program, the versions and the device, so that none is
ever out of date. JAX deletes the least recently used entries and locks the folder against other processes.

JAX writes an entry and then the time of its use. A process that ends between the two leaves an entry that keeps JAX
from writing any other, so `without_halves` removes such entries, and `at_rest` waits for those that are being written.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from peft_jax.cli.shared.common_options import CompilationOptions

LARGEST = 2**30  # bytes of all programs together
AHEAD = "compiled ahead"  # name of the thread that compiles a run's first step


def keep_programs(options: CompilationOptions) -> None:
    """Switch on JAX's persistent compilation cache.

    A cache that is set up already stays as it is, as by JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=false
    switches it off. Where the user's cache folder cannot be written, one line on stderr says so, and nothing is kept.

    Args:
        options: Where to, or whether at all.

    Raises:
        ValueError: If the folder that the options name cannot be written.
    """
    import jax

    named = options.compilation_cache
    if options.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    has_one, is_off = (
        jax.config.values["jax_compilation_cache_dir"],
        not jax.config.values["jax_enable_compilation_cache"],
    )
    if not named and (has_one or is_off):
        return
    folder = named or default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write it can run code in our name
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        said = f"compiled programs cannot be kept in {folder} ({error.strerror or error})"
        if named:
            raise ValueError(f"{said}. Name another folder, or write --no-compilation-cache.") from error
        print(f"peft-jax: {said}. Each start compiles them again.", file=sys.stderr)
        return
    without_halves(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)  # JAX locks the folder only where it has a limit
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # reading is always faster


def without_halves(folder: Path) -> None:
    """Remove the entries of a cache folder that have no time of use: their process ended while it wrote them."""
    with _locked(folder):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                entry.unlink(missing_ok=True)


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Hold JAX's lock of the cache folder in use, if there is one, so that no entry is being written meanwhile."""
    jax = sys.modules.get("jax")
    folder = None if jax is None else jax.config.values["jax_compilation_cache_dir"]
    if folder is None or not Path(folder).is_dir():
        yield
        return
    with _locked(Path(folder)):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of JAX's cache in a folder; after two seconds, and where files cannot be locked, go on without."""
    import filelock

    lock = filelock.FileLock(folder / ".lockfile")
    with contextlib.suppress(OSError):  # a Timeout is one
        lock.acquire(timeout=2)
    try:
        yield
    finally:
        lock.release()


def default_folder() -> Path:
    """The folder of compiled programs in the user's cache folder.

    Example:
        >>> default_folder().parts[-2:]
        ('peft_jax', 'compiled')
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "peft_jax" / "compiled"
