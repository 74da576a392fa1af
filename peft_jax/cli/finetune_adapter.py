"""The adapter that `peft-jax finetune` trains: any method by name, its config's fields from options or a file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import peft_jax as pj
from peft_jax.cli.finetune_options import DESCRIBED, AdapterOptions, Finetune, flag
from peft_jax.methods.base import Method, PeftConfig, by_name
from peft_jax.methods.scheduled import Scheduled
from peft_jax.prompts.base import PromptMethod

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"LORA": {"r": 8, "lora_alpha": 16}}  # where they are not PEFT's


def make_config(options: AdapterOptions) -> PeftConfig | None:
    """Make the adapter's config from the options or from their file; None where an adapter is given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the method or a field is unknown, given twice, or has a value that is wrong.
    """
    if options.adapter is not None:
        return None
    if options.adapter_config is not None:
        return _read_config(options.adapter_config)
    kind = by_name((options.peft or "LORA").upper())
    typed = {name: getattr(options, name) for name in DESCRIBED if getattr(options, name) is not None}
    if typed.get("target_modules") == ("all-linear",):
        typed["target_modules"] = "all-linear"
    given = _read_fields(options.peft_config) if options.peft_config is not None else {}
    for name in typed:
        if name not in _settable(kind):
            raise ValueError(f"{kind.peft_type} has no {flag(name)}. {_fields_of(kind)}")
        if name in given:
            raise ValueError(f"{flag(name)} and {name} in --peft-config say the same. Give one of them.")
    known = {field.name for field in dataclasses.fields(kind)} - OWN
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"--peft-config has {', '.join(unknown)}, which {kind.peft_type} has not. {_fields_of(kind)}")
    return kind(**{**DEFAULTS.get(kind.peft_type, {}), **typed, **given}, task_type="CAUSAL_LM")


OWN = {field.name for field in dataclasses.fields(PeftConfig)}  # fields that the command sets itself


def _settable(kind: type[PeftConfig]) -> list[str]:
    """The fields of a config that may have another value than their default."""
    fixed = ("default", "unused")
    return [f.name for f in dataclasses.fields(kind) if f.name not in OWN and not f.metadata.keys() & set(fixed)]


def _fields_of(kind: type[PeftConfig]) -> str:
    return f"Its fields, for --peft-config: {', '.join(_settable(kind))}."


def is_json(text: str | None) -> bool:
    """Whether a --peft-config is fields, not the name of a file with them."""
    return text is None or text.lstrip().startswith("{")


def _read_fields(text: str) -> dict[str, Any]:
    """The fields in a --peft-config."""
    rule = """Give fields, such as '{"target_modules": ["q_proj"]}', or a JSON file of them."""
    if not is_json(text):
        return _read_object(Path(text), "no --peft-config at", "the --peft-config", rule)
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--peft-config is not JSON: {error}. {rule}") from error
    return dict(fields)


def _read_config(file: Path) -> PeftConfig:
    rule = "Give a file like PEFT's adapter_config.json."
    fields = _read_object(file, "no adapter config at", "the adapter config", rule)
    return PeftConfig.from_dict(fields).replace(inference_mode=False, base_model_name_or_path=None, peft_version=None)


def _read_object(file: Path, missing: str, called: str, rule: str) -> dict[str, Any]:
    """The object in a JSON file; the other words are for what is said if it cannot be read."""
    if not file.is_file():
        raise FileNotFoundError(f"{missing} {file}. {rule}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{called} {file} is not JSON: {error}. {rule}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{called} {file} is not a JSON object. {rule}")
    return fields


def attach(base: Any, config: PeftConfig | None, options: Finetune, max_steps: int) -> Any:
    """Attach a fresh adapter for a run of so many steps, or the one to start from."""
    if config is None:
        assert options.adapter.adapter is not None
        return pj.PeftModel.from_pretrained(base, options.adapter.adapter, is_trainable=True)
    if not isinstance(config, Method):
        raise ValueError(f"adapters of the type {config.peft_type} cannot be trained by this command. Take another.")
    if isinstance(config, Scheduled):
        config = config.for_run(max_steps)
    if isinstance(config, PromptMethod):
        _check_prompt(config, options)
    return pj.get_peft_model(base, config, key=jax.random.key(options.training.seed))


def _check_prompt(config: PromptMethod, options: Finetune) -> None:
    """Raise ValueError for prompts that this command's data is not for."""
    if config.tasks:
        raise ValueError(
            f"{config.peft_type} is told each row's task, which data for this command does not name. Train it in "
            "Python (batches with task_ids), or take PROMPT_TUNING."
        )
    if config.virtual_tokens and options.data.packing:
        raise ValueError(
            f"{config.peft_type} puts its tokens at the head of a row, where --packing has several texts. Leave "
            "--packing out, or take PREFIX_TUNING."
        )
