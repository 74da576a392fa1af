"""Write docs/models.md: the architectures of the registry, what each is for, and the switches it refuses.

    python tools/model_table.py docs/models.md

Nothing in the tables is typed by hand. Sizes are those of transformers' default configurations, most of which are those
of published models. For the switches, every yes/no field of such a configuration is turned the other way, the values of
`OTHER` are set, and every rope is asked for; what the reader refuses by name is in the table.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.models.config import ModelConfig
from peft_jax.models.defaults import method_defaults
from peft_jax.models.family import Family
from peft_jax.models.modules.rope_parameters import USED, RopeParameters
from peft_jax.models.registry import FAMILIES, read_architecture

HEAD = """# Models

The architectures that are read from Hugging Face checkpoints and written back to them, by transformers' `model_type`.
Written by `make models`.

- **parameters**: of transformers' default configuration, which is mostly that of a published model.
- **LoRA's targets**: the modules that PEFT adapts where a config names none; where there are none, name them.
- **layers**: what a layer sees, and whether all layers are of one shape: those of one shape are one stack of arrays,
  over which a scan runs.
- **GGUF**: whether `gguf_file=` reads such a model from a GGUF file.

| model type | classes in transformers | tasks | parameters | LoRA's targets | layers | GGUF |
|---|---|---|---|---|---|---|
"""
REFUSED = """
## Switches that are refused

In the default configurations each yes/no field was turned the other way, attention in both directions and each kind of
rope was asked for, one at a time. These are refused by a line that names the field, and the others are read. Whatever
the model, a `model_type`, an activation or a tensor that is not known is refused too.

| model type | refused |
|---|---|
"""

# Values that are tried of fields that are not yes/no ones in every configuration, where it has such a field.
OTHER: Mapping[str, tuple[Any, ...]] = {"use_bidirectional_attention": (True, "all"), "is_causal": (False,)}
SCALES = ((1e9, "B"), (1e6, "M"))


def table() -> str:
    """The whole page."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the values that are tried
    models, refused = [], []
    for family in FAMILIES:
        for kind in family.config.stems:
            models.append(model_line(kind, family))
            refused.append(f"| {kind} | {listed(refusals(kind)) or '-'} |\n")
    logging.set_verbosity(verbosity)
    return HEAD + "".join(models) + REFUSED + "".join(refused)


def model_line(kind: str, family: Family) -> str:
    """The line of a model type in the first table."""
    config = read_architecture({"model_type": kind})
    classes = classes_of(config)
    targets = method_defaults("LORA", kind).get("target_modules", ())
    names = [targets] if isinstance(targets, str) else targets
    size = sum(math.prod(shape) for shape in family.param_shapes(config).values())
    has_file = any(row.model_type == kind for row in family.gguf.values())
    cells = [
        kind,
        listed(list(classes.values())),
        ", ".join(classes),
        in_words(size),
        listed(names) or "-",
        layers_of(config, family),
        "yes" if has_file else "no",
    ]
    return f"| {' | '.join(cells)} |\n"


def classes_of(config: ModelConfig) -> dict[str, str]:
    """The classes in transformers of a model type, by the tasks that it is for."""
    found = {}
    for task in config.tasks:
        try:
            found[task] = dataclasses.replace(config, task_type=task).architecture
        except ValueError:  # another model type of the family has a class for the task, this one has not
            continue
    return found


def layers_of(config: ModelConfig, family: Family) -> str:
    """The kinds of a model's layers, and the stacks that they are in."""
    if family.encoder_decoder is not None:
        return "one stack of the encoder, one of the decoder"
    kinds = " and ".join(sorted({kind.removesuffix("_attention") for kind in config.kinds}))
    stacks = len(set(config.stacks))
    return f"{kinds}; {f'{stacks} stacks' if stacks else 'one stack'}"


def refusals(kind: str) -> list[str]:
    """The switches that the reader of a model type's configurations refuses."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(kind)
    default = whole.get_text_config()
    is_part = default is not whole
    found = []
    for field, value in switches(default):
        asked = {"text_config": {field: value}} if is_part else {field: value}
        if is_refused({"model_type": kind, **asked}):
            found.append(named(field, value))
    return list(dict.fromkeys(found))


def switches(default: Any) -> Iterator[tuple[str, Any]]:
    """The fields and values that are tried of a model whose default configuration in transformers this is."""
    fields = default.to_dict()
    for field, value in fields.items():
        if isinstance(value, bool) and field not in OTHER:
            yield field, not value
    for field, values in OTHER.items():
        for value in values:
            yield field, value
    ropes = fields.get("rope_parameters")
    if ropes:
        head_dim = fields.get("head_dim") or default.hidden_size // default.num_attention_heads
        by_kind = {"": ropes} if "rope_type" in ropes else ropes
        for rope in ropes_to_try(head_dim // 2):
            tried = {kind: {**beside(own), **rope} for kind, own in by_kind.items()}
            yield "rope_parameters", tried.get("", tried)


def beside(rope: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a model has among its ``rope_parameters`` that is no field of a rope."""
    known = {field.name for field in dataclasses.fields(RopeParameters)}
    return {name: value for name, value in (rope or {}).items() if name not in known}


def ropes_to_try(pairs: int) -> Iterator[dict[str, Any]]:
    """Each kind of rope with all that it needs for so many pairs of features, and one that turns a part of them."""
    values = {
        **{"factor": 2.0, "original_max_position_embeddings": 1024, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs, "partial_rotary_factor": 0.5},
    }
    for kind, used in USED.items():
        wanted = ("partial_rotary_factor",) if kind == "proportional" else used
        own = {name: values[name] for name in wanted if name in values}
        yield {"rope_type": kind, "rope_theta": 10000.0, **own}
    yield {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def is_refused(hf: Mapping[str, Any]) -> bool:
    """Whether a configuration is refused as one that is not supported."""
    try:
        read_architecture(hf)
    except Exception as error:  # of whatever class where transformers itself has no such value
        return isinstance(error, ValueError) and "not supported" in str(error)
    return False


def named(field: str, value: Any) -> str:
    """A switch as a user writes it; of a rope, what is special about it."""
    if not isinstance(value, Mapping):
        return f"{field}={value!r}"
    rope = value if "rope_type" in value else next(iter(value.values()))
    is_partial = rope["rope_type"] == "default" and "partial_rotary_factor" in rope
    special = "partial_rotary_factor" if is_partial else "rope_type"
    return f"{special}={rope[special]!r}"


def in_words(size: int) -> str:
    """A number of parameters as it is spoken.

    Example:
        >>> in_words(6_738_415_616), in_words(124_439_808)
        ('6.7 B', '124 M')
    """
    scale, unit = next((scale, unit) for scale, unit in SCALES if size >= scale)
    return f"{size / scale:.{1 if unit == 'B' else 0}f} {unit}"


def listed(names: Sequence[str]) -> str:
    """Names in a cell of a table."""
    return ", ".join(f"`{name}`".replace("|", "\\|") for name in names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(table(), encoding="utf-8")
