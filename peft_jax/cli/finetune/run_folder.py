"""The folder of a training run: one run at a time writes to it, and it is gone if nothing was saved.

While a run goes on, a file in its folder is locked and marks the folder as the run's. A run that is killed leaves that
file. If it was killed before its first checkpoint, the file is how `--resume` knows that it may start the run afresh.
"""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from peft_jax.cli.finetune.initialize import START
from peft_jax.cli.finetune.processes import found_by_first
from peft_jax.cli.finetune.results import (
    BEST,
    CHECKPOINTS,
    METRICS,
    TENSORBOARD,
)
from peft_jax.cli.shared.lock import locked, unwritable
from peft_jax.cli.shared.output_folder import refuse_used
from peft_jax.cli.shared.progress_bar import WIDTH

HOW = "Give the same command with --resume to go on"
MARKER = ".peft-jax-run"
WRITTEN = (START, CHECKPOINTS, BEST, TENSORBOARD, METRICS)  # by a run before it has a checkpoint


@contextmanager
def run_folder(output: Path, *, resume: bool, saved: Callable[[], int | None]) -> Iterator[bool]:
    """Make the folder of a new run, or check that of one that goes on, and tidy up if the block raises.

    A lock keeps other runs out. Of several processes the first one does this for all.

    Args:
        output: The folder.
        resume: Whether it is of a run that goes on.
        saved: Returns the step of the last checkpoint; None means that nothing needs to be kept.

    Yields:
        Whether there is a checkpoint to go on from. A run that was killed before its first one starts afresh.

    Raises:
        BlockingIOError: If another run writes to the folder.
        FileExistsError: If a new run's folder is in use.
        FileNotFoundError: If there is no run to go on with.
        OSError: If the folder cannot be written to, or what the block raised, with what was saved.
    """
    with ExitStack() as stack:
        goes_on = found_by_first(lambda: stack.enter_context(_held(output, resume, saved)))
        try:
            yield goes_on
        except BaseException as error:
            step = saved()
            if step is None:
                raise
            state = f"The run is saved up to step {step}. {HOW}."
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped. {state}") from None
            if isinstance(error, OSError):
                raise OSError(f"{str(error).rstrip('.')}. {state}") from error
            raise


@contextmanager
def _held(output: Path, resume: bool, saved: Callable[[], int | None]) -> Iterator[bool]:
    """As `run_folder`, in the first process."""
    marker = output / MARKER
    if not marker.exists():  # otherwise the lock is asked first
        _check(output, resume, saved() is not None, marked=False)
    made = [parent for parent in (output, *output.parents) if not parent.exists()]
    try:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(output, error.strerror or str(error)) from error
        with locked(marker, output) as marked:
            has_checkpoint = saved() is not None
            _check(output, resume, has_checkpoint, marked=marked)
            if resume and not has_checkpoint:
                print(f"The run in {output} ended before its first checkpoint: it starts afresh, as given now.")
                _clear(output)
            try:
                yield has_checkpoint
            except BaseException:
                if saved() is None:
                    _clear(output)
                raise
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _check(output: Path, resume: bool, has_checkpoint: bool, *, marked: bool) -> None:
    if not resume:
        if has_checkpoint:
            raise FileExistsError(f"{output} already holds a run. {HOW}, or name another one with --output.")
        if marked:
            raise FileExistsError(
                f"{output} holds a run that ended before its first checkpoint. Give the same command with --resume to "
                "start it afresh, or name another one with --output."
            )
        refuse_used(output, [MARKER])
    elif not has_checkpoint and not marked:
        raise FileNotFoundError(
            f"no checkpoint in {output / CHECKPOINTS}, so there is nothing to resume. {_way(output)}"
        )
    elif not os.access(output, os.W_OK | os.X_OK):
        raise unwritable(output, "it is not a folder that you may write to")


def _way(output: Path) -> str:
    """How to go on with a folder that holds no run."""
    if output.is_dir() and any(entry.name != MARKER for entry in output.iterdir()):
        return f"Check --output. If nothing in that folder is needed: Remove {output} and start without --resume."
    return "Check --output, or start without --resume."


def _clear(output: Path) -> None:
    """Remove what a run without a checkpoint has written."""
    for name in WRITTEN:
        entry = output / name
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


class Stop:
    """Whether the run was asked to stop."""

    requested = False


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step at hand; a second one stops at once."""
    stop, signals = Stop(), (signal.SIGINT, signal.SIGTERM)

    def request(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        tqdm.write("Stopping after this step; once more stops at once.".ljust(WIDTH + 2), file=sys.stderr)  # over ^C

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread alone
        yield stop
        return
    before = {number: signal.signal(number, request) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
