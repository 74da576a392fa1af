"""Compiled programs are kept in a folder, so that the next start of a command need not compile them again.

JAX itself reads and writes the folder: an entry is found by the program, the versions and the device, so that none is
ever out of date. JAX deletes the least recently used entries and locks the folder against other processes.
"""

import os
import sys
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
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)  # JAX locks the folder only where it has a limit
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # reading is always faster


def default_folder() -> Path:
    """The folder of compiled programs in the user's cache folder.

    Example:
        >>> default_folder().parts[-2:]
        ('peft_jax', 'compiled')
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "peft_jax" / "compiled"
