"""Files of a finished run beside its checkpoints: the adapter, the loss curve and the model card."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_jax.cli.finetune.adapter_folder import Beside
from peft_jax.cli.finetune.card_snippet import layout_in_words, snippet, where_to_run
from peft_jax.cli.finetune.initialize import initial
from peft_jax.cli.finetune.options import DESCRIBED, Finetune, flag, settings
from peft_jax.cli.shared.end_token import end_tokens
from peft_jax.cli.shared.head_labels import LABELS_FILE, write_labels
from peft_jax.cli.shared.option_file import write_options
from peft_jax.cli.shared.task import Task
from peft_jax.cli.shared.training_layout import TrainingLayout
from peft_jax.models.handles.peft_model import PeftModel
from peft_jax.train import plot_losses
from peft_jax.train.metrics import read_metrics

METRICS, OPTIONS = "metrics.jsonl", "run.yaml"
BEST, CHECKPOINTS, TENSORBOARD = "best", "checkpoints", "tensorboard"  # folders
Curves = dict[str, list[tuple[int, float]]]


def export(model: PeftModel, task: Task, beside: Beside, folder: Path, options: Finetune, trainable: str) -> Curves:
    """Write the adapter in PEFT's format and what is beside it, loss.png, README.md and run.yaml.

    Each file appears whole or not at all.

    Returns:
        The curves: of the loss, and of the scores on rows kept apart by their names.
    """
    given, rows = settings(options), read_metrics(folder / METRICS)
    curves = {
        "training": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "validation": [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
    }
    losses = {name: points for name, points in curves.items() if points}
    curves = losses | _scores(rows)
    title = f"{Path(given['model']).name} on {' and '.join(Path(name).name for name in given['data'])}"
    _whole(folder / "loss.png", lambda file: plot_losses(file, losses, title=title))
    card = model_card(model, task, beside.layout if task.writes else None, given, curves, trainable)
    _whole(folder / "README.md", lambda file: file.write_text(card, encoding="utf-8"))
    _whole(folder / OPTIONS, lambda file: write_options(given, file))
    save(model, task, beside, folder, folder)
    return curves


def _scores(rows: list[dict[str, Any]]) -> Curves:
    """The scores on rows kept apart, by name."""
    curves: Curves = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("eval_") and name != "eval_loss":
                curves.setdefault(name.removeprefix("eval_"), []).append((row["step"], value))
    return curves


def scores_of(curves: Curves) -> list[str]:
    """The names of the curves that are scores, not losses."""
    return [name for name in curves if name not in ("training", "validation")]


def in_words(score: str) -> str:
    """A score's name as text has it.

    Example:
        >>> in_words("exact_match")
        'exact match'
    """
    return score.replace("_", " ")


def save(model: PeftModel, task: Task, beside: Beside, folder: Path, run: Path) -> None:
    """Write a run's adapter as one that goes on the base as it was, what is beside it, and the names of its classes."""
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial(model, run))
    beside.write(model, folder)
    if task.has_classes:
        _whole(folder / LABELS_FILE, lambda file: write_labels(model, file))


def _whole(file: Path, write: Callable[[Path], Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def model_card(
    model: PeftModel,
    task: Task,
    layout: TrainingLayout | None,
    settings: Mapping[str, Any],
    curves: Curves,
    trainable: str,
) -> str:
    """Write the README.md of an adapter, with the header that the Hugging Face hub reads."""
    base = settings["model"]
    results = [f"| last training loss | {curves['training'][-1][1]:.4f} (step {curves['training'][-1][0]}) |"]
    if "validation" in curves:
        step, best = min(curves["validation"], key=lambda point: point[1])
        results += [
            f"| last validation loss | {curves['validation'][-1][1]:.4f} (step {curves['validation'][-1][0]}) |",
            f"| best validation loss | {best:.4f} (step {step}, in `best/`) |",
        ]
    for name in scores_of(curves):
        step, value = curves[name][-1]
        results.append(f"| last validation {in_words(name)} | {value:.4f} (step {step}) |")
    config = next(iter(model.peft_config.values()))
    given = {**settings, **{name: getattr(config, name, None) for name in DESCRIBED}}
    typed = [f"| `{flag(name)}` | {_typed(value)} |" for name, value in given.items() if value is not None]
    ends = "" if not task.writes else f"An answer ends with {_tokens(end_tokens(model))}."
    more = f", num_labels={model.config.num_labels}" if task.has_classes else ""
    if task.has_classes and model.config.problem_type is not None:
        more += f", problem_type={model.config.problem_type!r}"
    if settings.get("gguf_file"):
        more += f", gguf_file={settings['gguf_file']!r}"
    trained_on = ", ".join(f"`{name}`" for name in settings["data"])
    lines = [
        *("---", f"base_model: {base}", "library_name: peft", f"pipeline_tag: {task.pipeline}"),
        *("tags:", f"- base_model:adapter:{base}", f"- {config.peft_type.lower()}", "- peft_jax", "---", ""),
        *(f"# {config.peft_type} adapter for {Path(base).name}", ""),
        *(f"Trained with `peft-jax finetune` on {trained_on}, in the format of Hugging Face PEFT:", ""),
        *("```python", *snippet(model, task, layout, more), "```", ""),
        *where_to_run(base),
        *("![Loss curve](loss.png)", "", trainable, ""),
        *((layout_in_words(layout), "") if layout else ()),
        *((ends, "") if ends else ()),
        *("| result | |", "|---|---|", *results, ""),
        *("| setting | |", "|---|---|", *typed, ""),
    ]
    return "\n".join(lines)


def _tokens(ids: Any) -> str:
    """The tokens that end an answer, in words."""
    if isinstance(ids, int):
        return f"token {ids}"
    return "one of the tokens " + ", ".join(map(str, ids)) if ids else "no token of its own"


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
