"""One side of `chip.py`: a process that holds its contenders on the chip, and builds and runs them as it is asked to.

    python benchmarks/chip_worker.py jax '{"work": "train", "size": "tiny", ...}'

Its first line says what the side runs on. Then each line that it reads is a JSON object, ``{"build": NAME}`` or
``{"run": NAME}``, and is answered by one: the facts of what was built, the seconds of a run, or ``failed`` and why.
Weights are made at random on the chip.
"""

import functools
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, TextIO

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # what JAX may take, as it needs it

import bare_image
import measure
from chip_plan import LIMIT
from measure import Contender, NotRun, load_side
from recording import package_versions
from shapes import SHAPES, token_ids

QUANTIZED = ("int8", "nf4", "int4")
MULTIPLIED = 10  # products that wait for each other, so that none waits for Python


class Side:
    """The contenders of one side of a part.

    Attributes:
        name: jax or torch.
        settings: What `chip_plan.Part.settings` says.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self.built: dict[str, Contender] = {}
        if name == "jax":
            bare_image.prepare()
        self.side = load_side(name)

    def device(self) -> str:
        """The name of the chip."""
        if self.name == "jax":
            import jax

            return str(jax.devices()[0].device_kind)
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    def build(self, name: str) -> dict[str, Any]:
        """Make a contender ready and run it once; return what is known of it.

        Raises:
            NotRun: If it cannot run here.
        """
        made = {"matmul": self.matmul, "train": self.train, "decode": self.decode}[self.settings["work"]]
        contender = made(name)
        contender.run()
        self.built[name] = contender
        return dict(contender.facts)

    def run(self, name: str) -> float:
        """Seconds of a run: those that it returns, or else those that it takes."""
        gc.collect()
        with measure.collector_off():
            returned, seconds = measure.timed(self.built[name].run)
        return returned if isinstance(returned, float) else seconds

    @functools.cached_property
    def base(self) -> Any:
        """The model in bfloat16, which the contenders of a side of JAX share."""
        return self.new_base()

    def new_base(self) -> Any:
        """A new model in bfloat16 with random weights."""
        options = {"remat": self.settings["remat"]} if self.name == "jax" else {}
        return self.side.random_model(SHAPES[self.settings["size"]], "bfloat16", **options)

    def matmul(self, name: str) -> Contender:
        """Products of square matrices of bfloat16, one after the other."""
        import jax
        import jax.numpy as jnp

        width = int(self.settings["size"])
        left, right = (jax.random.normal(jax.random.key(seed), (width, width), jnp.bfloat16) for seed in (0, 1))
        scaled = right / math.sqrt(width)  # the products stay as large as they were

        @jax.jit
        def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
            return left @ right

        def run() -> float:
            start, product = time.perf_counter(), left
            for _ in range(MULTIPLIED):
                product = multiply(product, scaled)
            jax.block_until_ready(product)
            return (time.perf_counter() - start) / MULTIPLIED

        return Contender(name, run)

    def train(self, name: str) -> Contender:
        """A training step of LoRA on all linear layers, or the products with frozen weights alone."""
        ids = token_ids(SHAPES[self.settings["size"]], self.settings["rows"], self.settings["length"])
        if name == LIMIT:
            return self.side.weight_products(name, self.base, ids.size)
        config = self.side.lora(self.settings["rank"])
        if self.name == "jax":
            base = self.base
            kind = name.removeprefix("ours ")
            if kind in QUANTIZED:
                base = quantized(base, kind)
            step = self.side.training_step(name, self.side.attach(base, config), ids)
            return Contender(name, step.run, {**step.facts, "peak_bytes": step.facts["xla_bytes"]})
        before = self.side.memory_in_use()
        model = self.side.attach(self.new_base(), config)
        options = {"compiled": name == "peft compiled", "checkpointing": self.settings["remat"]}
        step = self.side.training_step(name, model, ids, **options)
        self.side.forget_peak()
        step.run()
        peak = self.side.device_peak()
        return Contender(name, step.run, {**step.facts, "peak_bytes": None if peak is None else peak - before})

    def decode(self, name: str) -> Contender:
        """Greedy decoding: what a run with all new tokens takes beyond one with a single token."""
        kind = name.split(": ")[1].split()
        rows, count = int(kind[0]), int(kind[3]) if len(kind) > 2 else None
        ids = token_ids(SHAPES[self.settings["size"]], rows, self.settings["length"])
        names = None if count is None else [f"a{row % count}" for row in range(rows)]
        generate = self.side.generator(self.with_adapters(count or 1), ids, names)
        new = self.settings["new"]

        def run() -> float:
            first = measure.timed(lambda: generate(1))[1]
            return measure.timed(lambda: generate(new))[1] - first

        return Contender(name, run, {"tokens": rows * (new - 1)})

    @functools.cache  # noqa: B019  # a side lives as long as its process
    def with_adapters(self, count: int) -> Any:
        """The model with a number of random adapters."""
        model = self.base if self.name == "jax" else self.new_base()
        return self.side.with_adapters(model, self.settings["rank"], count)


def quantized(model: Any, kind: str) -> Any:
    """The model with the matrices of its layers in a quantized format."""
    import jax

    import peft_jax as pj

    options = {"bits": 8} if kind == "int8" else {"kind": kind}
    return jax.block_until_ready(pj.quantize(model, **options))


def answered(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer to a request, or why there is none."""
    try:
        return ask()
    except NotRun as reason:
        return {"failed": str(reason)}
    except Exception as error:  # of many kinds: out of memory, an operation that is not there
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


def serve(name: str, settings: dict[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    sides: list[Side] = []

    def greet() -> dict[str, Any]:
        sides.append(Side(name, settings))
        return {"device": sides[0].device(), "versions": package_versions()}

    say(answered(greet))
    for line in requests:
        request = json.loads(line)
        if "build" in request:
            say(answered(lambda: {"facts": sides[0].build(request["build"])}))  # noqa: B023  # called at once
        else:
            say(answered(lambda: {"seconds": sides[0].run(request["run"])}))  # noqa: B023


if __name__ == "__main__":
    scratch = tempfile.mkdtemp()  # what an ended process has compiled in part is read by no other one
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)
