"""Warnings for results that the caller throws away, where a method gives a new handle and changes nothing."""

import dis
import sys
import warnings


def warn_if_discarded(call: str) -> None:
    """Warn if the method that calls this was called as a statement, or entered by a ``with`` without ``as``.

    The interpreter drops a result that nobody takes in the instruction after the call. Where frames cannot be read,
    nothing is said.

    Args:
        call: The call as its user writes it, for the warning.

    Example:
        >>> import warnings
        >>> def renamed():
        ...     warn_if_discarded("renamed()")
        >>> def caller():
        ...     renamed()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     caller()
        >>> "Write model = renamed()" in str(caught[0].message)
        True
    """
    if not hasattr(sys, "_getframe"):
        return
    caller = sys._getframe(2)
    following = (one for one in dis.get_instructions(caller.f_code) if one.offset > caller.f_lasti)
    after = next(following, None)
    if after is not None and after.opname == "POP_TOP":
        warnings.warn(
            f"{call} gives a new model and changes none, and here nobody takes it. Write model = {call}, or "
            f"with {call} as model: and call that model.",
            stacklevel=3,
        )
