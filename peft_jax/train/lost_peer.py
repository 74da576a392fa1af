"""Errors of JAX that come of the end of another process of the run."""

import re

import jax

STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
OF_ANOTHER = re.compile(r"gloo|nccl|coordination|heartbeat|barrier|connect|socket|peer|preempt", re.IGNORECASE)
OF_STORAGE = "os_error_code="


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process ended, or cannot be reached; False where there is no other.

    Want of memory and errors of a program have the same type. What arrays of several processes raise is a ValueError
    with the same text, and so are errors of the storage layer.

    Example:
        >>> is_of_lost_peer(ValueError("UNKNOWN: Gloo AllGather failed"))  # of one process
        False
    """
    if jax.process_count() == 1:
        return False
    said = str(error)
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError) and STATUS.match(said) is not None
    return is_of_jax and OF_STORAGE not in said and OF_ANOTHER.search(said) is not None
