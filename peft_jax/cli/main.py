"""`peft-jax`: reads the command line, runs a command, turns a user's error into one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import jax
import tyro

from peft_jax.cli.demo import Demo, demo
from peft_jax.cli.evaluate import Eval, evaluate_model
from peft_jax.cli.finetune.finetune import Finetune, finetune
from peft_jax.cli.generate.generate import Generate, generate
from peft_jax.cli.inspect.inspect import Inspect, inspect
from peft_jax.cli.merge import Merge, merge
from peft_jax.cli.shared.terminal import escape_tracebacks, escaped_output, unescaped

Command = (
    Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)

INTERRUPTED, UNREAD = 130, 141  # as shells say it
FRAME = r"[\u2500-\u257f]+|\x1b\[[0-9;]*m"  # what tyro draws around a message, and on a terminal its colours


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words after ``peft-jax``; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error of the user's or for want of memory, said in one line, or 130 after
        Ctrl-C, or 141 where nobody reads on what is printed, as in ``peft-jax generate ... | head -1``. Any other
        exception is a bug and goes through with its traceback. All that is printed passes through
        `peft_jax.cli.shared.terminal`.
    """
    with escaped_output():
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    try:
        command = parse(args)
        if isinstance(command, Demo):
            demo(command)
        elif isinstance(command, Generate):
            generate(command)
        elif isinstance(command, Eval):
            evaluate_model(command)
        elif isinstance(command, Merge):
            merge(command)
        elif isinstance(command, Inspect):
            inspect(command)
        else:
            finetune(command)
        sys.stdout.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # for what Python flushes at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return UNREAD
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(f"{error} Use smaller batches, shorter texts or --load-in-8bit.", 2)
    except KeyboardInterrupt as stopped:
        print("peft-jax:", str(stopped) or "stopped; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    return 0


def run() -> NoReturn:
    """The installed command: the process ends with `main`'s exit code.

    After Ctrl-C it ends at once. A compilation goes on in a thread of JAX's own, and would crash in what Python's
    orderly end has torn down.
    """
    escape_tracebacks()
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(args: Sequence[str] | None) -> Finetune | Generate | Eval | Merge | Inspect | Demo:
    """Read the command line; tyro's boxed message about a wrong one becomes a ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(unescaped()):  # --help has colours
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
        raise ValueError(re.sub(FRAME, " ", said.getvalue())) from exit


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line on stderr."""
    print("peft-jax: error:", *message.split(), file=sys.stderr)
    return code
