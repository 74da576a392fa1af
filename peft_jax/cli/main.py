"""`peft-jax`: reads the command line, runs a command, turns a user's error into one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from peft_jax.cli.demo import Demo, demo
from peft_jax.cli.finetune import Finetune, finetune

Command = Annotated[Finetune, tyro.conf.subcommand("finetune")] | Annotated[Demo, tyro.conf.subcommand("demo")]


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words after ``peft-jax``; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error of the user's, said in one line, or 130 after Ctrl-C. An exception of
        another kind than ValueError and OSError is a bug and goes through with its traceback.
    """
    try:
        command = parse(args)
        if isinstance(command, Demo):
            demo(command)
        else:
            finetune(command)
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    except KeyboardInterrupt:
        return fail("stopped; nothing was written.", 130)
    return 0


def parse(args: Sequence[str] | None) -> Finetune | Demo:
    """Read the command line; tyro's boxed message about a wrong one becomes a ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Command,
                args=args,
                prog="peft-jax",
                description="Parameter-efficient fine-tuning in JAX.",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ValueError(re.sub(r"[\u2500-\u257f]+", " ", said.getvalue())) from exit


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line on stderr."""
    print("peft-jax: error:", *message.split(), file=sys.stderr)
    return code
