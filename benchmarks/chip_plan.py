"""What `chip.py` measures, in the order of its worth: the first parts are measured even if time runs out."""

import dataclasses
from typing import Any, Literal

Work = Literal["matmul", "train", "decode"]
MATMUL, LIMIT = "matmul", "limit"
SIDES = ("jax", "torch")


@dataclasses.dataclass(frozen=True)
class Part:
    """Contenders that are timed in turn.

    Attributes:
        name: Heads its table.
        work: A product of square matrices, a training step of LoRA, or greedy decoding.
        size: The Llama's shape, or the matrices' width.
        stages: Contenders by name. Those of a stage are built, then all that were built so far are timed in turn, so
            that the first stages have their figures before a slow or large contender is tried.
        rows: Of a batch of training.
        length: Tokens of such a row, or of a prompt.
        new: Tokens that are decoded.
        rank: Of the adapters.
        remat: Whether each layer is computed again in the backward pass, on both sides.
    """

    name: str
    work: Work
    size: str
    stages: tuple[tuple[str, ...], ...]
    rows: int = 1
    length: int = 1
    new: int = 1
    rank: int = 16
    remat: bool = False

    @property
    def contenders(self) -> list[str]:
        """Those of all stages."""
        return [name for stage in self.stages for name in stage]

    @property
    def settings(self) -> dict[str, Any]:
        """All but the contenders, for a record and for the processes that do the work."""
        found = dataclasses.asdict(self)
        del found["stages"]
        return found


def side_of(contender: str) -> str:
    """The process that does a contender's work: torch for PEFT's, else jax."""
    return "torch" if contender.startswith("peft") else "jax"


def decoders(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Both sides' contenders of kinds of decoding."""
    return tuple(f"{side}: {kind}" for kind in kinds for side in ("ours", "peft"))


FIRST = (LIMIT, "ours bf16", "peft bf16", "ours int8")
ROWS = decoders(("1 row", "8 rows", "64 rows"))
ADAPTERS = decoders(("64 rows of 1 adapter", "64 rows of 8 adapters", "64 rows of 64 adapters"))
RECOMPUTED = ("ours bf16", "peft bf16", "ours int8")
# One row of 8B: both sides hold its weights at the same time, and the activations of a step.
PARTS = (
    Part("matmul", "matmul", "8192", ((MATMUL,),)),
    Part("train 8b", "train", "8b", (FIRST,), length=2048),
    Part("decode 1b", "decode", "1b", (ROWS,), length=128, new=33),
    Part("train 1b", "train", "1b", (FIRST, ("peft compiled",)), rows=4, length=2048),
    Part("train 8b compiled", "train", "8b", (("ours bf16", "peft compiled"),), length=2048),
    Part("decode 1b adapters", "decode", "1b", (ADAPTERS,), length=128, new=33),
    Part("train 8b 4-bit", "train", "8b", (("ours bf16", "ours nf4", "ours int4"),), length=2048),
    Part("train 1b 4-bit", "train", "1b", (("ours bf16", "ours nf4", "ours int4"),), rows=4, length=2048),
    Part("train 8b more rows", "train", "8b", ((LIMIT, "ours bf16", "ours int8"),), rows=4, length=2048),
    Part("train 8b recomputed", "train", "8b", (RECOMPUTED,), rows=4, length=2048, remat=True),
)
TINY = (
    Part("matmul", "matmul", "64", ((MATMUL,),)),
    Part("train tiny", "train", "tiny", (FIRST, ("ours nf4", "peft compiled")), rows=2, length=16, rank=2),
    Part(
        "decode tiny",
        "decode",
        "tiny",
        (decoders(("1 row", "4 rows")), decoders(("4 rows of 1 adapter", "4 rows of 4 adapters"))),
        length=8,
        new=5,
        rank=2,
    ),
    Part(
        "train tiny recomputed",
        "train",
        "tiny",
        (("ours bf16", "peft bf16", "ours int4"),),
        rows=2,
        length=16,
        rank=2,
        remat=True,
    ),
)
