"""What a finished run writes beside its checkpoints: the adapter, the loss curve and the model card."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_jax.cli.finetune_options import DESCRIBED, flag
from peft_jax.train import plot_losses
from peft_jax.train.metrics import read_metrics

METRICS = "metrics.jsonl"
Curves = dict[str, list[tuple[int, float]]]


def export(model: Any, folder: Path, settings: Mapping[str, Any], trainable: str) -> Curves:
    """Write the adapter in PEFT's format, loss.png and README.md; each file appears whole or not at all.

    Returns:
        The loss curves.
    """
    rows = read_metrics(folder / METRICS)
    curves = {
        "training": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "validation": [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
    }
    curves = {name: points for name, points in curves.items() if points}
    title = f"{Path(settings['model']).name} on {Path(settings['data']).name}"
    _whole(folder / "loss.png", lambda file: plot_losses(file, curves, title=title))
    card = model_card(model, settings, curves, trainable)
    _whole(folder / "README.md", lambda file: file.write_text(card, encoding="utf-8"))
    model.save_pretrained(folder)
    return curves


def _whole(file: Path, write: Callable[[Path], Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def model_card(model: Any, settings: Mapping[str, Any], curves: Curves, trainable: str) -> str:
    """Write the README.md of an adapter, with the header that the Hugging Face hub reads."""
    base = settings["model"]
    results = [f"| last training loss | {curves['training'][-1][1]:.4f} (step {curves['training'][-1][0]}) |"]
    if "validation" in curves:
        step, best = min(curves["validation"], key=lambda point: point[1])
        results += [
            f"| last validation loss | {curves['validation'][-1][1]:.4f} (step {curves['validation'][-1][0]}) |",
            f"| best validation loss | {best:.4f} (step {step}, in `best/`) |",
        ]
    config = next(iter(model.peft_config.values()))
    given = {**settings, **{name: getattr(config, name, None) for name in DESCRIBED}}
    typed = [f"| `{flag(name)}` | {_typed(value)} |" for name, value in given.items() if value is not None]
    lines = [
        *("---", f"base_model: {base}", "library_name: peft", "pipeline_tag: text-generation"),
        *("tags:", f"- base_model:adapter:{base}", f"- {config.peft_type.lower()}", "- peft_jax", "---", ""),
        *(f"# {config.peft_type} adapter for {Path(base).name}", ""),
        *(f"Trained with `peft-jax finetune` on `{settings['data']}`, in the format of Hugging Face PEFT:", ""),
        *("```python", "from peft import AutoPeftModelForCausalLM", ""),
        *('model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")', "```", ""),
        *("![Loss curve](loss.png)", "", trainable, ""),
        *("| result | |", "|---|---|", *results, ""),
        *("| setting | |", "|---|---|", *typed, ""),
    ]
    return "\n".join(lines)


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
