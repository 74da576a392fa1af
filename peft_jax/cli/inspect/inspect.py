"""`peft-jax inspect`: what an adapter's folder holds, whether it fits a base, and who takes it."""

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.cli.command_options import Inspect as Inspect
from peft_jax.cli.inspect.servers import Verdict, verdicts
from peft_jax.cli.shared.terminal import in_one_line
from peft_jax.interop.base_file import read_base_file
from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.interop.describe import (
    KEYS_AND_VALUES,
    PICKLE_FILE,
    AdapterFolder,
    misfits,
    prompt_misfits,
    read_adapter,
    spell,
)
from peft_jax.interop.formats import PREFIX, ROWS
from peft_jax.interop.tensors import misfits as adapter_misfits
from peft_jax.methods.base import Method
from peft_jax.methods.lora.checks import layer_order
from peft_jax.models.config import ModelConfig
from peft_jax.models.defaults import prompt_sizes
from peft_jax.models.gguf_checkpoint import base_config
from peft_jax.models.handles.peft_model import PEFT_MODELS
from peft_jax.models.registry import family_of, read_architecture

WIDTH, LABEL = 80, 12
SHOWN = 3  # reasons that an adapter does not fit
VARIANTS = {  # by the field that switches one on
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}


def inspect(options: Inspect) -> None:
    """Run the command.

    Raises:
        ValueError: If a file is damaged, or the base is of an unsupported kind.
        OSError: If a file or folder is missing.
    """
    adapter = read_adapter(options.adapter)
    reasons = None
    if options.model is not None:
        config = config_for(options.model, adapter.config.get("task_type"), options.gguf_file)
        refusal = loading_misfits(adapter, config)
        if ranges := adapter.config.get("layer_replication"):
            config = family_of(config).with_layers(config, layer_order(ranges))
        kind = "PREFIX_TUNING" if adapter.peft_type in KEYS_AND_VALUES else adapter.peft_type
        reasons = misfits(adapter, base_shapes(config)) + prompt_misfits(adapter, prompt_sizes(kind, config))
        if refusal is not None:  # what loading says counts; the reasons above say it in words where they can
            reasons = (reasons or refusal) if refusal else []
    if options.json:
        print(json.dumps(as_json(adapter, options.model, reasons), indent=2))
    else:
        print("\n".join(as_text(adapter, options.model, reasons)))


def loading_misfits(adapter: AdapterFolder, config: ModelConfig) -> list[str] | None:
    """Why `peft_jax.interop.load_adapter` would refuse an adapter on a base; None if it loads no such adapters."""
    if adapter.tensors is None or adapter.peft_type not in ROWS:
        return None
    try:
        method = Method.from_dict({**adapter.config, "inference_mode": True})
    except (TypeError, ValueError) as error:
        return [str(error)]
    (handle,) = {cls.base for cls in PEFT_MODELS if cls.base.task == config.task_type}
    shapes = {key: tensor.shape for key, tensor in adapter.tensors.items()}
    found: list[str] = []

    def plan(key: jax.Array) -> None:
        params = family_of(config).init_params(config, key, jnp.dtype("float32"))
        base = handle(params, config).resized_for(adapter.path)
        found.extend(adapter_misfits(base, method, shapes))

    try:
        jax.eval_shape(plan, jax.random.key(0))  # shapes alone: no parameter is made
    except ValueError as error:
        found.append(str(error))
    return found


def config_for(model: str, task_type: str | None, gguf_file: str | None = None) -> ModelConfig:
    """The config of a base model, for the task that an adapter is for if it can do that.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is of an unsupported kind.
    """
    files = ("config.json",) if gguf_file is None else (gguf_file,)
    config = read_architecture(base_config(find_checkpoint(model, files), gguf_file))
    if task_type is None or task_type not in config.tasks:
        return config
    return dataclasses.replace(config, task_type=task_type)


def base_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a base model by its key; a matrix as ``(out, in)``, however it is stored."""
    family = family_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for row in family.rows(config):
        shape = row.tensor_shape
        is_kernel = row.path.endswith(".kernel") and not row.transposed
        shapes |= dict.fromkeys(row.keys, shape[::-1] if is_kernel else shape)
    for tied in family.tied_modules(config):
        shapes[f"{tied}.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def as_json(adapter: AdapterFolder, model: str | None, reasons: list[str] | None) -> dict[str, Any]:
    """Everything, for programs."""
    tensors = adapter.tensors
    described = None
    if tensors is not None:
        described = {key: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes} for key, t in sorted(tensors.items())}
    found: dict[str, Any] = {
        "folder": str(adapter.path),
        "config": adapter.config,
        "problems": adapter.problems(),
        "trained_parameters": None if tensors is None else adapter.trained,
        "modules": {
            module: {"rank": rank, "scaling": adapter.scaling(module)} for module, rank in adapter.ranks.items()
        },
        "frozen": adapter.frozen,
        "tensors": described,
        "servers": {one.program: {"takes": one.takes, "note": one.note} for one in verdicts(adapter)},
    }
    if reasons is not None:
        fits = not (reasons or found["problems"]) if adapter.judged or reasons else None
        found["fit"] = {"model": model, "fits": fits, "judged_by": adapter.judged, "reasons": reasons}
    return found


def as_text(adapter: AdapterFolder, model: str | None, reasons: list[str] | None) -> Iterator[str]:
    """The lines for a terminal of 80 columns."""
    for name, value in _facts(adapter):
        yield from _labelled(name, value)
    if adapter.tensors:
        yield from ("", *_table(adapter))
    yield ""
    problems = adapter.problems()
    if problems:
        yield from _labelled("Damaged", _some(problems))
    if reasons is not None:
        wrong = problems + reasons
        told = f"yes, by {adapter.judged}" if adapter.judged else "nothing is known of its tensors"
        yield from _labelled("Fits", f"{model}: " + (f"no, {_some(wrong)}" if wrong else told))
    yield "Taken by"
    for verdict in verdicts(adapter):
        yield from _verdict(verdict)


def _facts(adapter: AdapterFolder) -> Iterator[tuple[str, str]]:
    config = adapter.config
    by = f", written by PEFT {config['peft_version']}" if config.get("peft_version") else ""
    yield "Adapter", str(adapter.path)
    yield "Method", f"{_method(config)}{f' for {t}' if (t := config.get('task_type')) else ''}{by}"
    gguf_file = read_base_file(adapter.path)
    yield "Base", (config.get("base_model_name_or_path") or "not named") + (f", {gguf_file}" if gguf_file else "")
    if adapter.ranks:
        scalings = {module: adapter.scaling(module) for module in adapter.ranks}
        yield "Rank", _values(adapter.ranks)
        yield "Scale", f"{_values(scalings)} (alpha {config.get('lora_alpha', 8):g})"
    elif "r" in config:
        yield "Rank", f"{config['r']}, by {'its config' if adapter.tensors else 'its config alone'}"
    if adapter.prompt is not None:
        yield "Prompt", _prompt(adapter, adapter.prompt)
    if targets := config.get("target_modules"):
        count = f" ({len(adapter.ranks)} modules)" if adapter.ranks else ""
        yield "Targets", (targets if isinstance(targets, str) else ", ".join(sorted(targets))) + count
    if saved := config.get("modules_to_save"):
        yield "Saved whole", ", ".join(saved)
    if (bias := config.get("bias", "none")) != "none":
        yield "Biases", f"trained ({bias})"
    if adapter.tensors is None:
        yield "Tensors", f"in {PICKLE_FILE}, a pickled file, which is not read"
        return
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    yield "Trained", f"{adapter.trained:,} parameters"
    yield "Tensors", f"{len(adapter.tensors)} in {_bytes(size)}"


def _prompt(adapter: AdapterFolder, shape: tuple[int, int]) -> str:
    """The virtual tokens of a prompt, and what each is."""
    rows, width = shape
    tokens, layers = adapter.config.get("num_virtual_tokens") or rows, adapter.config.get("num_layers")
    each = f"an embedding of {width} features"
    if adapter.peft_type in KEYS_AND_VALUES:
        each = f"keys and values of {width} numbers" + (f" in {layers} layers" if layers else "")
    more = f", {rows // tokens} rows each" if rows > tokens else ""
    tasks = adapter.config.get("num_tasks") if adapter.peft_type == "MULTITASK_PROMPT_TUNING" else None
    return f"{tokens} virtual tokens{more}, each {each}" + (f", for {tasks} tasks" if tasks else "")


def _method(config: dict[str, Any]) -> str:
    names = {"LORA": "LoRA"}
    extra = [what for field, what in VARIANTS.items() if config.get(field) not in (None, False)]
    name = names.get(config["peft_type"], config["peft_type"])
    return f"{name} ({', '.join(extra)})" if extra else str(name)


def _values(by_module: dict[str, Any]) -> str:
    """One value if all modules share it, else each value with how many modules have it."""
    counts: dict[Any, int] = {}
    for value in by_module.values():
        counts[value] = counts.get(value, 0) + 1
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} in {count} module{'s' * (count > 1)}" for value, count in sorted(counts.items()))


def _table(adapter: AdapterFolder) -> Iterator[str]:
    """A line for each kind of tensor: the same name in several layers is one line."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for key, tensor in sorted((adapter.tensors or {}).items(), key=lambda item: _natural(item[0])):
        name = in_one_line(re.sub(r"\.\d+\.", ".*.", key.removeprefix(PREFIX)))
        kinds.setdefault((name, spell(tensor.shape), tensor.dtype), []).append(tensor.nbytes)
    lines = [("Tensor", "Shape", "Type", "Count", "Bytes")]
    lines += [(*kind, str(len(sizes)), _bytes(sum(sizes))) for kind, sizes in kinds.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 8)
    for line in lines:
        name = line[0] if len(line[0]) <= widths[0] else "..." + line[0][3 - widths[0] :]
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0], cells[2] = name.ljust(widths[0]), line[2].ljust(widths[2])  # names and types begin at the left
        yield "  ".join(cells).rstrip()


def _natural(key: str) -> list[Any]:
    """A key to sort by: numbers in a name by their value."""
    parts: list[tuple[int, int, str]] = []
    for part in key.split("."):
        parts.append((0, int(part), "") if part.isdigit() else (1, 0, part))
    return parts


def _verdict(verdict: Verdict) -> Iterator[str]:
    answer = "yes" if verdict.takes else "no"
    first = f"  {verdict.program:<{LABEL - 2}}{answer:<4}{verdict.note}".rstrip()
    yield from _wrapped(first, LABEL + 4)


def _labelled(name: str, value: str) -> list[str]:
    return _wrapped(f"{name:<{LABEL}}{value}", LABEL)


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False) or [line]


def _some(reasons: list[str]) -> str:
    more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    return "; ".join(reasons[:SHOWN]) + more


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
