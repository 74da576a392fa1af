"""Makes the instruction data of `peft-jax demo`: questions about functions of CPython's standard library.

Every answer can be read off its input, a signature, so that an adapter trained on shuffled answers cannot do as well.
Names of functions never occur in both files: one name in ten is held out, as in the pretraining text.

    python examples/make_demo_instructions.py --out peft_jax/cli/demo_data
"""

import dataclasses
import json
import random
from pathlib import Path

import cpython_text
import tyro


@dataclasses.dataclass(frozen=True)
class Instructions:
    """What to write, and where.

    Attributes:
        out: Folder for instructions_train.json and instructions_heldout.json.
        train: Number of questions to train on.
        held_out: Number of questions to evaluate on.
        longest_signature: Longer signatures are left out.
        seed: Seed of the choice and order of the questions.
    """

    out: Path
    train: int = 2000
    held_out: int = 200
    longest_signature: int = 50
    seed: int = 0


def questions(function: cpython_text.Function) -> dict[str, str]:
    """Return what can be asked about a function, with the answers."""
    return {
        "Name the function.": function.name,
        "List the parameters.": ", ".join(function.parameters),
        "Write a call of the function.": function.call,
        "Which parameters have a default?": ", ".join(function.defaults) or "none",
        "What is the last parameter?": function.parameters[-1],
    }


def usable(function: cpython_text.Function, config: Instructions) -> bool:
    """Tell whether a function has two parameters or more, none of a special kind, and a short, ordinary name."""
    plain = not any(mark in function.signature for mark in ("*", "/", "__"))
    return plain and len(function.parameters) > 1 and len(function.signature) <= config.longest_signature


def ask(functions: list[cpython_text.Function], count: int, rng: random.Random) -> list[dict[str, str]]:
    """Ask one random question about each of `count` functions with different signatures."""
    by_signature = {function.signature: function for function in functions}
    chosen = rng.sample(sorted(by_signature), count)
    pairs = [(signature, rng.choice(sorted(questions(by_signature[signature]).items()))) for signature in chosen]
    return [{"instruction": question, "input": signature, "output": answer} for signature, (question, answer) in pairs]


def main(config: Instructions) -> None:
    """Write both files."""
    rng = random.Random(config.seed)
    functions = [function for function in cpython_text.functions() if usable(function, config)]
    for held_out, name, count in ((False, "train", config.train), (True, "heldout", config.held_out)):
        items = ask([f for f in functions if cpython_text.is_held_out(f.name) == held_out], count, rng)
        text = "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]\n"
        (config.out / f"instructions_{name}.json").write_text(text)
        print(f"{name}: {len(items)} of {len(functions)} functions")


if __name__ == "__main__":
    main(tyro.cli(Instructions))
