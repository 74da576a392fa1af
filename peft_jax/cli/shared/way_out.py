"""Advice for a full disk, and for an accelerator that is not there."""

import errno
import os
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
TEXTS = tuple(os.strerror(code) for code in FULL)  # libraries for files give the text alone


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def of_full_disk(error: Exception) -> str:
    """Advice if an error comes from a full disk, as a sentence behind its message; empty otherwise.

    Example:
        >>> of_full_disk(OSError(errno.ENOSPC, "No space left on device"))
        'Free space on that disk, or name a folder on another one with --output.'
        >>> of_full_disk(OSError("no such file"))
        ''
    """
    is_full = any(getattr(cause, "errno", None) in FULL for cause in _causes(error))
    if not is_full and not any(text in str(error) for text in TEXTS):
        return ""
    if "--resume" in str(error):
        return "Free space on that disk first; --save-total-limit 1 keeps one checkpoint alone."
    if "--output" in str(error):
        return "Or free space on that disk."
    return "Free space on that disk, or name a folder on another one with --output."


def of_missing_device() -> str | None:
    """Advice if JAX has no device of the platform that it was told to use, as a line; None if it has one."""
    import jax  # which takes long to import, and is there already where something went wrong with it

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        said = str(error).split("(set JAX_PLATFORMS")[0].strip().rstrip(".")
        reason = f" ({' '.join(said.split())})" if said else ""
        return (
            f"JAX_PLATFORMS is {platforms}, and JAX finds no such device here{reason}. Unset it to run on what there "
            "is, or write JAX_PLATFORMS=cpu. A GPU needs JAX's build for CUDA: pip install 'jax[cuda12]'."
        )
    return None
