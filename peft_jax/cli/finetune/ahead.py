"""The programs of a run's first step are compiled in a thread, while the data are tokenized and the weights are read.

An outline of a model is the model with `jax.ShapeDtypeStruct` in place of its arrays. What can be known of a run
without its weights is made of an outline; where no outline can be made, all waits for the weights.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import jax

from peft_jax.cli.shared.compilation_cache import AHEAD
from peft_jax.core.pytree import PyTree
from peft_jax.interop.checkpoint import shapes_alone

T = TypeVar("T")


def outline_of(make: Callable[..., T], *outlines: PyTree) -> T | None:
    """Run a function in outline, in which it reads no weight of a checkpoint.

    Args:
        make: The function.
        *outlines: Its arguments, of which some may be outlines.

    Returns:
        The outline of what it returns. None if it looks at values, or fails, as it then will again when it is called.

    Example:
        >>> outline_of(lambda x: x + 1, jax.ShapeDtypeStruct((2,), "float32"))
        ShapeDtypeStruct(shape=(2,), dtype=float32)
        >>> outline_of(lambda x: x if x > 0 else -x, jax.ShapeDtypeStruct((), "float32"))
    """
    try:
        with shapes_alone(), warnings.catch_warnings(action="ignore"):
            return jax.eval_shape(make, *outlines)
    except Exception:  # whatever it is: the run itself comes to it and reports it
        return None


def is_outline(tree: PyTree) -> bool:
    """Whether the arrays of a tree are shapes alone.

    Example:
        >>> is_outline(jax.eval_shape(lambda: {"a": jax.numpy.ones(2)}))
        True
    """
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


@contextmanager
def compiled_meanwhile(
    programs: Callable[[], Iterable[jax.stages.Lowered]], *, all_of_them: bool = True
) -> Iterator[None]:
    """Lower and compile in a thread while the block runs, and wait at the end.

    An error of the thread is dropped: where the run needs the program, it compiles it too, and reports the error. After
    an error inside, no further program is begun, and the one that is being compiled is not waited for. The thread is no
    daemon, since a compilation crashes once the interpreter is torn down: Python's orderly end waits for it, and the
    command ends without one (`peft_jax.cli.main.run`).

    Args:
        programs: What gives the programs one after the other; run in the thread.
        all_of_them: Whether all programs are waited for at the end, or only the one that is being compiled then.

    Example:
        >>> double = jax.jit(lambda x: x * 2)
        >>> with compiled_meanwhile(lambda: [double.lower(jax.ShapeDtypeStruct((2,), "float32"))]):
        ...     x = jax.numpy.ones(2)
        >>> double(x).tolist()
        [2.0, 2.0]
    """
    stopped = threading.Event()
    thread = threading.Thread(target=partial(_compile, programs, stopped), name=AHEAD)
    thread.start()
    try:
        yield
    except BaseException:
        stopped.set()
        raise
    if not all_of_them:
        stopped.set()
    thread.join()


def _compile(programs: Callable[[], Iterable[jax.stages.Lowered]], stopped: threading.Event) -> None:
    try:
        for program in programs():
            if stopped.is_set():
                return
            program.compile()
            if stopped.is_set():
                return
    except Exception:  # whatever it is: the run itself comes to it and reports it
        return
