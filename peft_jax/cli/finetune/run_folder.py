"""The folder of a training run: made at its start, kept once a checkpoint is in it, gone if nothing was saved."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from peft_jax.cli.finetune.processes import is_first, wait_for_all
from peft_jax.cli.shared.output_folder import refuse_used, unwritable
from peft_jax.cli.shared.progress_bar import WIDTH

HOW = "Give the same command with --resume to go on"


@contextmanager
def run_folder(output: Path, *, resume: bool, saved: Callable[[], int | None]) -> Iterator[None]:
    """Make the folder of a new run, or check that of one that goes on; tidy up if the block raises.

    Of several processes all check, and the first one makes and tidies up.

    Args:
        output: The folder.
        resume: Whether it is of a run that goes on.
        saved: Tells the step of the last checkpoint; None means that nothing needs to be kept.

    Raises:
        FileExistsError: If a new run's folder is in use.
        FileNotFoundError: If there is no checkpoint to go on from.
        OSError: If the folder cannot be written to, or what the block raised, with what was saved.
    """
    _check(output, resume, saved)
    made = [parent for parent in (output, *output.parents) if not parent.exists()] if is_first() else []
    wait_for_all("the folder is checked")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for parent in made:
            if parent.exists():
                parent.rmdir()
        raise unwritable(output, error.strerror or str(error)) from error
    try:
        yield
    except BaseException as error:
        step = saved()
        if step is None:
            if is_first():
                _remove(output, made)
            raise
        told = f"The run is saved up to step {step}. {HOW}."
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"stopped. {told}") from None
        if isinstance(error, OSError):
            raise OSError(f"{str(error).rstrip('.')}. {told}") from error
        raise


def _check(output: Path, resume: bool, saved: Callable[[], int | None]) -> None:
    if not resume:
        if saved() is not None:
            raise FileExistsError(f"{output} already holds a run. {HOW}, or name another one with --output.")
        refuse_used(output)
    elif saved() is None:
        rest = f"Remove {output} and" if output.exists() else "Run"
        raise FileNotFoundError(
            f"no checkpoint in {output / 'checkpoints'}, so there is nothing to resume. {rest} start without --resume."
        )
    elif not os.access(output, os.W_OK | os.X_OK):
        raise unwritable(output, "it is not a folder that you may write to")


def _remove(output: Path, made: list[Path]) -> None:
    for entry in output.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for parent in made:
        parent.rmdir()


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
