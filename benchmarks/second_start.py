"""The processor time of `peft-jax finetune` from its imports to its first step, when its programs are kept already.

    python benchmarks/second_start.py --layers 6

A toy with few features is trained for one step in fresh processes, so that its products take next to nothing. All that
the command imports on the way is imported before the clock starts; the checkpoint is too small for reading to count.
Where PyTorch is installed, transformers imports it too, before the clock starts.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

OWN = "its own process"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
RUN = "finetune --model model --data data.json --output out{} --max-steps 1 --batch-size 8 --compilation-cache cache"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work.

    Attributes:
        layers: Of the model.
        starts: Processes, of which the first compiles the programs.
    """

    layers: int = 6
    starts: int = 6


def write_work(layers: int) -> None:
    """Write a checkpoint and data to the current folder."""
    from ours import random_model

    from peft_jax.cli.demo_data import MODEL

    fields = json.loads((MODEL / "config.json").read_text())
    shape = {name: fields[name] for name in SIZES}
    random_model({**shape, "num_hidden_layers": layers}, "float32").save_pretrained(Path("model"))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, "model")
    records = [{"prompt": "Count:", "completion": " ".join(map(str, range(n)))} for n in range(2, 34)]
    Path("data.json").write_text(json.dumps(records))


def first_step(number: int) -> float:
    """Seconds of the processor from the imports to the first step of this process."""
    import grain  # noqa: F401
    import jax
    import transformers.models.llama.configuration_llama  # noqa: F401

    import peft_jax.cli.finetune.finetune  # noqa: F401
    import peft_jax.models.handles.auto  # noqa: F401
    from peft_jax.cli.main import main
    from peft_jax.train.metrics import MetricsLog

    write, ends = MetricsLog.write, []

    def noted(self: MetricsLog, row: dict[str, float | int]) -> None:
        ends.append(time.process_time())
        write(self, row)

    MetricsLog.write = noted  # type: ignore[method-assign]
    jax.devices()
    begin = time.process_time()
    if main(RUN.format(number).split()) != 0:
        raise SystemExit("the run failed")
    return ends[0] - begin


def main(settings: Settings) -> None:
    """Print the seconds of each start."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(__file__).resolve())
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

        def run(*words: str) -> str:
            command = [sys.executable, program, OWN, *words]
            return subprocess.run(
                command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout

        run("write", str(settings.layers))
        seconds = [float(run("start", str(number)).splitlines()[-1]) for number in range(settings.starts)]
    later = sorted(seconds[1:])
    print(f"first start: {seconds[0]:.2f} s of the processor")
    print(f"later starts: {later[len(later) // 2]:.2f} s, {later[0]:.2f} to {later[-1]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == [OWN]:
        kind, number = sys.argv[2:]
        write_work(int(number)) if kind == "write" else print(first_step(int(number)))
    else:
        main(tyro.cli(Settings))
