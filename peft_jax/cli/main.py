"""`peft-jax`: reads the command line, runs a command, turns a user's error into one line."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from peft_jax.cli.command_options import Demo, Eval, Generate, Inspect, Merge
from peft_jax.cli.finetune.options import Finetune
from peft_jax.cli.shared.command_line import nearest, overview, parse_command, with_flags
from peft_jax.cli.shared.terminal import escape_tracebacks, escaped_output
from peft_jax.cli.shared.way_out import of_full_disk, of_missing_device
from peft_jax.core.short_errors import shortened

Command = Finetune | Generate | Eval | Merge | Inspect | Demo
COMMANDS: Mapping[str, type[Command]] = {
    "finetune": Finetune,
    "generate": Generate,
    "eval": Eval,
    "merge": Merge,
    "inspect": Inspect,
    "demo": Demo,
}

INTERRUPTED, UNREAD = 130, 141  # as shells say it


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words after ``peft-jax``; those of the process by default.

    Returns:
        The exit code: 0, or 2 after an error of the user's or for want of memory, disk or a device, said in one line,
        or 130 after Ctrl-C, or 141 where the output's reader has closed it, as in ``peft-jax generate ... | head -1``.
        Any other exception is a bug and goes through with its traceback. All that is printed passes through
        `peft_jax.cli.shared.terminal`.
    """
    with escaped_output():
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    command: Command | None = None
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
        return fail(_explained(error, command), 2)
    except (RuntimeError, AssertionError) as error:
        if "jax" in sys.modules and (message := of_missing_device()):
            return fail(message, 2)
        if not isinstance(error, RuntimeError) or not _is_want_of_memory(error):
            raise
        return fail(f"{error} Use smaller batches, shorter texts or --load-in-8bit or --load-in-4bit.", 2)
    except KeyboardInterrupt as stopped:
        print("peft-jax:", str(stopped) or "stopped; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _explained(error: Exception, command: Command | None) -> str:
    """The message of a user's error, in the words of the command, with a way out."""
    message = str(error) if command is None else with_flags(str(error), command)
    way_out = of_full_disk(error)
    return f"{message.rstrip('.')}. {way_out}" if way_out else message


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


def parse(args: Sequence[str] | None) -> Command:
    """Read the command line, which may ask for help instead: then that is printed, and SystemExit raised.

    Raises:
        ValueError: If a word is wrong or missing.
    """
    words = list(sys.argv[1:] if args is None else args)
    known = ", ".join(COMMANDS)
    if not words:
        raise ValueError(f"no command is given. Give one of {known}.")
    name, *rest = words
    if name in ("-h", "--help"):
        print(overview("Parameter-efficient fine-tuning in JAX.", COMMANDS))
        raise SystemExit
    if name not in COMMANDS:
        raise ValueError(f"there is no command '{name}'.{nearest(name, list(COMMANDS))} Give one of {known}.")
    return parse_command(COMMANDS[name], name, rest)


# The commands import JAX and the models, which takes seconds, so they are imported when they run.


def finetune(options: Finetune) -> None:
    """Run `peft-jax finetune`."""
    from peft_jax.cli.finetune import finetune as command

    command.finetune(options)


def generate(options: Generate) -> None:
    """Run `peft-jax generate`."""
    from peft_jax.cli.generate import generate as command

    command.generate(options)


def evaluate_model(options: Eval) -> None:
    """Run `peft-jax eval`."""
    from peft_jax.cli import evaluate as command

    command.evaluate_model(options)


def merge(options: Merge) -> None:
    """Run `peft-jax merge`."""
    from peft_jax.cli import merge as command

    command.merge(options)


def inspect(options: Inspect) -> None:
    """Run `peft-jax inspect`."""
    from peft_jax.cli.inspect import inspect as command

    command.inspect(options)


def demo(options: Demo) -> None:
    """Run `peft-jax demo`."""
    from peft_jax.cli import demo as command

    command.demo(options)


def _is_want_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line on stderr."""
    print("peft-jax: error:", shortened(" ".join(message.split())), file=sys.stderr)
    return code
