"""`peft-jax`: reads the command line, runs a command, turns a user's error into one line."""

import contextlib
import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from peft_jax.cli.command_options import Demo, Eval, Generate, Inspect, Merge, Preview
from peft_jax.cli.finetune.options import Finetune
from peft_jax.cli.shared.command_line import nearest, overview, parse_command, with_flags
from peft_jax.cli.shared.common_options import CompilationOptions
from peft_jax.cli.shared.compilation_cache import AHEAD, at_rest, keep_programs
from peft_jax.cli.shared.terminal import escape_tracebacks, escaped_output
from peft_jax.cli.shared.way_out import of_full_disk, of_missing_device
from peft_jax.core.short_errors import shortened

Command = Finetune | Preview | Generate | Eval | Merge | Inspect | Demo
COMMANDS: Mapping[str, type[Command]] = {
    "finetune": Finetune,
    "preview": Preview,
    "generate": Generate,
    "eval": Eval,
    "merge": Merge,
    "inspect": Inspect,
    "demo": Demo,
}

DEBUG = "--debug"  # of all commands
DEFECT, REFUSED = 1, 2
INTERRUPTED, UNREAD = 130, 141  # as shells say it


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The words after ``peft-jax``; those of the process by default.

    Returns:
        The exit status: 0; 1 for a defect of the program; 2 after an error of the user's or for want of memory,
        disk or a device; 130 after Ctrl-C; 141 where the output's reader has closed it, as in
        ``peft-jax generate ... | head -1``. Each but 141 is said in one line on stderr. ``--debug`` among the words
        prints the traceback before it. All that is printed passes through `peft_jax.cli.shared.terminal`.
    """
    words = list(sys.argv[1:] if args is None else args)
    options = words[: words.index("--")] if "--" in words else words
    debug = DEBUG in options
    if debug:
        words.remove(DEBUG)
    with escaped_output():
        return _run(words, debug)


def _run(words: Sequence[str], debug: bool) -> int:
    command: Command | None = None
    try:
        command = parse(words)
        _run_command(command)
        sys.stdout.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # for what Python flushes at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt as stopped:
        print("peft-jax:", str(stopped) or "stopped; nothing was written.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # whatever it is, one line says it
        if debug:
            traceback.print_exc()
        return _failed(error, command)
    return 0


def _explained(error: Exception, command: Command | None) -> str:
    """The message of a user's error, in the words of the command, with a way out."""
    message = str(error) if command is None else with_flags(str(error), command)
    way_out = of_full_disk(error)
    return f"{message.rstrip('.')}. {way_out}" if way_out else message


def _run_command(command: Command) -> None:
    compilation = command.compilation if isinstance(command, Finetune) else command
    if isinstance(compilation, CompilationOptions):
        keep_programs(compilation)
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
    elif isinstance(command, Preview):
        preview(command)
    else:
        finetune(command)


def _failed(error: Exception, command: Command | None) -> int:
    """Say in one line what ended a command; the exit status."""
    if isinstance(error, ValueError | OSError):
        return fail(_explained(error, command), REFUSED)
    is_of_jax = isinstance(error, RuntimeError | AssertionError) and "jax" in sys.modules
    if is_of_jax and (message := of_missing_device()):
        return fail(message, REFUSED)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_want_of_memory(error)):
        said = str(error) or "out of memory."
        return fail(f"{said} Use smaller batches, shorter texts or --load-in-8bit or --load-in-4bit.", REFUSED)
    said = f"{type(error).__name__}: {error}".rstrip(".: ")
    return fail(f"{said}. This is a defect of peft-jax: report what the same command says with {DEBUG}.", DEFECT)


def run() -> NoReturn:
    """The installed command: the process ends with `main`'s exit code.

    After Ctrl-C, and after an error while a program is compiled ahead, it ends at once: Python's orderly end would wait
    for the compilation.
    """
    escape_tracebacks()
    code = main()
    is_compiling = any(thread.name == AHEAD for thread in threading.enumerate())
    if code == INTERRUPTED or is_compiling:
        end_at_once(code)
    sys.exit(code)


def end_at_once(code: int) -> None:
    """End the process without Python's orderly end, but not amid a program that is being written to the cache."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read them may be gone
            stream.flush()
    with at_rest():
        os._exit(code)


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


@contextlib.contextmanager
def imports_left_alone() -> Iterator[None]:
    """Let Python's garbage collector pass over all that is there when the block begins, which is what was imported.

    JAX, Flax and the models are some hundred thousand objects. While programs are traced, a search through all of them
    comes due, takes 0.3 s and finds nothing. What a caller froze stays so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def finetune(options: Finetune) -> None:
    """Run `peft-jax finetune`."""
    from peft_jax.cli.finetune import finetune as command

    with imports_left_alone():
        command.finetune(options)


def preview(options: Preview) -> None:
    """Run `peft-jax preview`."""
    from peft_jax.cli import preview as command

    with imports_left_alone():
        command.preview(options)


def generate(options: Generate) -> None:
    """Run `peft-jax generate`."""
    from peft_jax.cli.generate import generate as command

    with imports_left_alone():
        command.generate(options)


def evaluate_model(options: Eval) -> None:
    """Run `peft-jax eval`."""
    from peft_jax.cli import evaluate as command

    with imports_left_alone():
        command.evaluate_model(options)


def merge(options: Merge) -> None:
    """Run `peft-jax merge`."""
    from peft_jax.cli import merge as command

    with imports_left_alone():
        command.merge(options)


def inspect(options: Inspect) -> None:
    """Run `peft-jax inspect`."""
    from peft_jax.cli.inspect import inspect as command

    with imports_left_alone():
        command.inspect(options)


def demo(options: Demo) -> None:
    """Run `peft-jax demo`."""
    from peft_jax.cli import demo as command

    with imports_left_alone():
        command.demo(options)


def _is_want_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line on stderr."""
    print("peft-jax: error:", shortened(" ".join(message.split())), file=sys.stderr)
    return code
