"""Errors of JAX that come of the end of another process of the run."""

import re

import jax

STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


def is_of_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process ended, or cannot be reached; False where there is no other.

    Want of memory has the same type. What arrays of several processes raise is a ValueError with the same text.

    Example:
        >>> is_of_lost_peer(ValueError("UNKNOWN: Gloo AllGather failed"))  # of one process
        False
    """
    if jax.process_count() == 1:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return isinstance(error, ValueError) and STATUS.match(str(error)) is not None
