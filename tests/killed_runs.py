"""Runs `peft-jax finetune` in child processes, kills them at chosen or random moments, and resumes them.

    python tests/killed_runs.py FOLDER few|all [SEED ...]

FOLDER holds a model and data.json. Runs go into FOLDER/whole (not killed), FOLDER/chosen (killed and resumed at every
moment below in turn), FOLDER/early (killed before its first checkpoint, at every moment of EARLY in turn), and
FOLDER/random-<SEED>, killed at some time, mostly after its first checkpoint. With "few" the moments are those of FEW
and FEW_EARLY; with "all" there are FOLDER/whole-<KIND> and FOLDER/<KIND> (killed once) for each of KINDS too.
Exit codes are printed as JSON, a list for each run: of those that were killed, and of the last one. All children are
forked from this process, which has imported everything and touched no device.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot  # noqa: F401
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from transformers import AutoConfig

from peft_jax.cli.finetune import run_folder
from peft_jax.cli.finetune.run_folder import MARKER
from peft_jax.cli.finetune.steps import Plan
from peft_jax.cli.main import main
from peft_jax.prompts.tokenizer import read_tokenizer
from peft_jax.train.metrics import MetricsLog

OPTIONS = (
    "finetune --model model --data data.json --max-steps 14 --batch-size 4 --micro-batch-size 2 --val-size 4 "
    "--eval-steps 2 --save-steps 3 --learning-rate 0.01"
).split()
LORA = ("--lora-dropout", "0.1")
KINDS = {
    "prompt": ("--peft", "P_TUNING", "--peft-config", '{"num_virtual_tokens": 4, "encoder_hidden_size": 8}'),
    "int8": ("--load-in-8bit", *LORA),
    "nf4": ("--load-in-4bit", *LORA),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_save(output: str) -> None:
    """After the files of checkpoint 6 are written, before they get their name."""
    whole = AtomicRenameTemporaryPath.finalize

    async def finalize(self: Any) -> None:
        if str(self.get_final()).endswith(f"{output}/checkpoints/6"):
            kill()
        await whole(self)

    AtomicRenameTemporaryPath.finalize = finalize


def amid_files(output: str) -> None:
    """While checkpoint 6 has some of its files."""
    whole = AtomicRenameTemporaryPath.create

    async def create(self: Any) -> Any:
        if f"{output}/checkpoints/6." in str(self.get_final()):
            kill()
        return await whole(self)

    AtomicRenameTemporaryPath.create = create


def after_rename(output: str) -> None:
    """Right after checkpoint 6 has its name, before old ones are removed."""
    whole = AtomicRenameTemporaryPath.finalize

    async def finalize(self: Any) -> None:
        await whole(self)
        if str(self.get_final()).endswith(f"{output}/checkpoints/6"):
            kill()

    AtomicRenameTemporaryPath.finalize = finalize


def in_metrics(output: str) -> None:
    """With half a row of metrics in the file."""
    whole = MetricsLog.write

    def write(self: MetricsLog, row: Any) -> None:
        if row["step"] == 8:
            self._stream.write(json.dumps(row).encode()[:20])
            self._stream.flush()
            kill()
        whole(self, row)

    MetricsLog.write = write  # type: ignore[method-assign]


def in_evaluation(output: str) -> None:
    """During the evaluation of step 8."""
    whole = Plan.validation

    def validation(self: Plan, state: Any, frozen: Any) -> dict[str, float]:
        found = whole(self, state, frozen)
        return kill() if state.step == 8 else found  # type: ignore[return-value]

    Plan.validation = validation  # type: ignore[method-assign]


def _before_the_name(output: str, file: str, count: int) -> None:
    whole, seen = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal seen
        seen += str(target) == f"{output}/{file}"
        if seen == count and str(target) == f"{output}/{file}":
            kill()
        whole(source, target)

    os.replace = replace


def in_best(output: str) -> None:
    """Between the two files of the second best adapter."""
    _before_the_name(output, "best/adapter_config.json", 2)


def beside_best(output: str) -> None:
    """With files of the second best adapter's tokenizer that have no name yet."""
    _before_the_name(output, "best/tokenizer.json", 2)


def in_export(output: str) -> None:
    """Between the two files of the final adapter."""
    _before_the_name(output, "adapter_config.json", 1)


def in_plot(output: str) -> None:
    """Before the loss curve has its name."""
    _before_the_name(output, "loss.png", 1)


def before_marker(output: str) -> None:
    """After the folder is made, before it is marked."""
    run_folder.locked = lambda marker, folder: kill()  # type: ignore[attr-defined, assignment]


def before_number(output: str) -> None:
    """After the marker is made, before it says whose it is."""
    os.ftruncate = lambda handle, size: kill()


def in_first_metrics(output: str) -> None:
    """After the first evaluation, with a best adapter and no checkpoint."""
    whole = MetricsLog.write

    def write(self: MetricsLog, row: Any) -> None:
        whole(self, row)
        if row["step"] == 3:
            kill()

    MetricsLog.write = write  # type: ignore[method-assign]


def in_first_save(output: str) -> None:
    """While the first checkpoint has some of its files."""
    whole = AtomicRenameTemporaryPath.create

    async def create(self: Any) -> Any:
        if f"{output}/checkpoints/3." in str(self.get_final()):
            kill()
        return await whole(self)

    AtomicRenameTemporaryPath.create = create


EARLY = ((before_marker, ()), (before_number, ()), (in_first_metrics, ()), (in_first_save, ("--resume",)))
FEW_EARLY = ((in_first_metrics, ()),)
MOMENTS = (in_save, amid_files, after_rename, in_metrics, in_evaluation, in_best, beside_best, in_plot, in_export)
FEW = (in_save, in_metrics, beside_best, in_export)


def fork(
    output: str, *words: str, adapter: tuple[str, ...] = LORA, prepare: Callable[[str], None] = lambda output: None
) -> int:
    """Start a run in a child process; what it says goes to a file."""
    if child := os.fork():
        return child
    said = os.open(f"{output}{''.join(words)}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 1
    try:
        prepare(output)
        code = main([*OPTIONS, *adapter, "--output", output, *words])
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_random(seed: int, seconds: float) -> list[int]:
    """Kill a run at some time, mostly after its first checkpoint, and go on with it.

    One that ends before it is killed is removed, and another one is killed within half the time.
    """
    output, dice = f"random-{seed}", random.Random(seed)
    is_late = seed % 3 > 0  # else at any moment from the start on
    longest = seconds if is_late else 4 * seconds
    while True:
        child = fork(output)
        while is_late and not (Path(output) / "checkpoints" / "3").exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        if code != 0:
            break
        shutil.rmtree(output)
        longest /= 2
    words = ("--resume",) if has_marker(output) else ()
    return [code, wait(fork(output, *words))]


def has_marker(output: str) -> bool:
    """Whether a run has marked its folder, or ended: from then on it is resumed, and before that started again."""
    return (Path(output) / MARKER).exists() or (Path(output) / "checkpoints").exists()


def runs(kind: str, seeds: list[int]) -> dict[str, list[int]]:
    """All runs, and their exit codes."""
    moments, early = (FEW, FEW_EARLY) if kind == "few" else (MOMENTS, EARLY)
    codes = {"whole": [wait(fork("whole"))], "chosen": [], "early": []}
    for moment in moments:
        words = ("--resume",) if codes["chosen"] else ()
        codes["chosen"].append(wait(fork("chosen", *words, prepare=moment)))
    codes["chosen"].append(wait(fork("chosen", "--resume")))
    for moment, words in early:
        codes["early"].append(wait(fork("early", *words, prepare=moment)))
    codes["early"].append(wait(fork("early", "--resume")))
    if kind == "all":
        for name, words in KINDS.items():
            codes[f"whole-{name}"] = [wait(fork(f"whole-{name}", adapter=words))]
            first = wait(fork(name, adapter=words, prepare=in_save))
            codes[name] = [first, wait(fork(name, "--resume", adapter=words))]
    return codes | {f"random-{seed}": at_random(seed, 1.5) for seed in seeds}


def prepared(folder: str) -> None:
    """Go to a folder, and import and set what all children need."""
    os.chdir(folder)
    importlib.import_module("peft_jax.cli.finetune.finetune")
    AutoConfig.from_pretrained("model"), read_tokenizer("model")  # which import much at their first use
    jax.config.update("jax_compilation_cache_dir", str(Path("cache").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


if __name__ == "__main__":
    prepared(sys.argv[1])
    print(json.dumps(runs(sys.argv[2], [int(seed) for seed in sys.argv[3:]])))
