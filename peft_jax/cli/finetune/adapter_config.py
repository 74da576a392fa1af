"""The adapter that `peft-jax finetune` trains: any method by name, its config's fields from options or a file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import peft_jax as pj
from peft_jax.adapters.from_data import starts_from_data
from peft_jax.cli.finetune.initialize import resumed, started
from peft_jax.cli.finetune.options import (
    DESCRIBED,
    AdapterOptions,
    Finetune,
    flag,
)
from peft_jax.cli.shared.task import (
    Task,
    check_options,
    fresh_modules,
    refuse_random,
    task_of,
)
from peft_jax.core.precision import with_compute_dtype
from peft_jax.core.selecting import field_names, fields_of, not_none
from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.core.targets import SAVED_HEADS
from peft_jax.core.text_files import read_object
from peft_jax.methods.base import Method, PeftConfig, by_name
from peft_jax.methods.lora.initializers.table import from_data
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields
from peft_jax.methods.tasks import HasTasks
from peft_jax.prompts.base import PromptMethod
from peft_jax.train.data.batches import Data
from peft_jax.train.hooks import for_run

# Where they are not PEFT's, which has none for prompts.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 16},
    **dict.fromkeys(
        ("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"),
        {"num_virtual_tokens": 20},
    ),
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": 2},
}


def make_config(options: AdapterOptions) -> PeftConfig:
    """Make the adapter's config from the options or from their file; that of the adapter where one is given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the method or a field is unknown, given twice, or has a value that is wrong.
    """
    if options.adapter is not None:
        return PeftConfig.from_pretrained(options.adapter)
    if options.adapter_config is not None:
        return _read_config(options.adapter_config)
    kind = by_name((options.peft or "LORA").upper())
    typed = not_none(fields_of(options, DESCRIBED))
    if typed.get("target_modules") == ("all-linear",):
        typed["target_modules"] = "all-linear"
    given = _read_fields(options.peft_config) if options.peft_config is not None else {}
    for name in typed:
        if name not in _settable(kind):
            raise ValueError(f"{kind.peft_type} has no {flag(name)}. {_fields_of(kind)}")
        if name in given:
            raise ValueError(f"{flag(name)} and {name} in --peft-config say the same. Give one of them.")
    known = {*field_names(kind)} - OWN
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"--peft-config has {', '.join(unknown)}, which {kind.peft_type} has not. {_fields_of(kind)}")
    return kind(**{**DEFAULTS.get(kind.peft_type, {}), **typed, **given})


def with_rate(options: Finetune, config: PeftConfig) -> Finetune:
    """The options with the learning rate that suits the adapter's method where none is given; it is printed."""
    if options.training.learning_rate is not None:
        return options
    rate = config.learning_rate
    print(f"Learning rate {rate:g}, which suits {config.peft_type}; --learning-rate sets another.")
    return dataclasses.replace(options, training=dataclasses.replace(options.training, learning_rate=rate))


OWN = {*field_names(PeftConfig)}  # fields that the command sets itself
SHARED = {*field_names(TargetFields), *field_names(ExcludeFields), *field_names(LayerFields)}


def _settable(kind: type[PeftConfig]) -> list[str]:
    """The fields of a config that may have another value than their default, the method's own before the shared."""
    own: list[str] = []
    shared: list[str] = []
    for field in dataclasses.fields(kind):
        is_fixed = "default" in field.metadata or "unused" in field.metadata
        if field.name in OWN or is_fixed:
            continue
        part = shared if field.name in SHARED else own
        part.append(field.name)
    return own + shared


def _fields_of(kind: type[PeftConfig]) -> str:
    return f"Its fields, for --peft-config: {', '.join(_settable(kind))}."


def is_json(text: str | None) -> bool:
    """Whether a --peft-config is fields, not the name of a file with them."""
    return text is None or text.lstrip().startswith("{")


def _read_fields(text: str) -> dict[str, Any]:
    """The fields in a --peft-config."""
    rule = """Give fields, such as '{"target_modules": ["q_proj"]}', or a JSON file of them."""
    if not is_json(text):
        return read_object(Path(text), "--peft-config", rule)
    try:
        fields = parse_json(text)
    except JSONError as error:
        raise ValueError(f"--peft-config is not JSON: {error}. {rule}") from error
    return dict(fields)


def _read_config(file: Path) -> PeftConfig:
    fields = read_object(file, "adapter config", "Give a file like PEFT's adapter_config.json.")
    return PeftConfig.from_dict(fields).replace(inference_mode=False, base_model_name_or_path=None, peft_version=None)


def choose_task(options: Finetune, config: PeftConfig) -> Task:
    """The task of a run: of the option, of the adapter's config, or of the checkpoint.

    Raises:
        ValueError: If the option and the config contradict each other, the checkpoint is not for the task, or an
            option is for other tasks.
    """
    said = options.base.task
    if said is not None and config.task_type not in (None, said):
        raise ValueError(f"--task {said}, but the adapter's config has the task_type {config.task_type}. Drop --task.")
    task = task_of(options.base.model, said or config.task_type, options.base.gguf_file)
    check_options(task, vars(options.base) | vars(options.data))
    return task


def settle(config: PeftConfig, base: Any, options: Finetune, max_steps: int) -> PeftConfig:
    """The config as it goes onto the base for a run of ``max_steps``; that of an adapter to start from stays.

    Raises:
        ValueError: If this command does not train such an adapter, or not with these options.
    """
    if options.adapter.adapter is not None:
        return config
    if not isinstance(config, Method):
        raise ValueError(f"adapters of the type {config.peft_type} cannot be trained by this command. Take another.")
    config = for_run(config, max_steps)
    if isinstance(config, PromptMethod):
        _check_prompt(config, options)
    if options.data.packing and isinstance(config, HasTasks) and config.tasks:
        raise ValueError(
            f"{config.peft_type} has one task for a row, where --packing has several texts. Leave --packing out."
        )
    config = with_fresh_modules(config, base)
    if options.adapter.start_batches is not None and not starts_from_data(config):
        raise ValueError(
            f"--start-batches is for a LoRA with init_lora_weights {', '.join(from_data())} in --peft-config. Leave it "
            "out."
        )
    return config


def attach(base: Any, config: PeftConfig, options: Finetune, data: Data) -> Any:
    """Attach a fresh adapter with the config from `settle` for a run on ``data``, or the adapter to start from."""
    model = _attached(base, config, options, data)
    refuse_random(model)
    return with_compute_dtype(model, options.adapter.compute_dtype)


def _attached(base: Any, config: PeftConfig, options: Finetune, data: Data) -> Any:
    if options.adapter.adapter is not None:
        return pj.PeftModel.from_pretrained(
            base.resized_for(options.adapter.adapter), options.adapter.adapter, is_trainable=True
        )
    assert isinstance(config, Method)  # `settle` has seen to it
    if starts_from_data(config):
        return resumed(base, options.run.output) if options.run.resume else started(base, config, options, data)
    return pj.get_peft_model(base, config, key=jax.random.key(options.training.seed))


def with_fresh_modules(config: Method, base: Any) -> Method:
    """The config with what the checkpoint lacks, beside the head that PEFT trains anyway, in ``modules_to_save``.

    PEFT leaves a pooler that starts at random as it is, and out of the file, which then fits no base.
    """
    heads = SAVED_HEADS.get(config.task_type, ())
    rest = [name for name in fresh_modules(base) if not set(name.split(".")) & set(heads)]
    if not rest or "modules_to_save" not in field_names(config):
        return config
    print(f"The checkpoint has no {', '.join(rest)}: trained whole, beside the adapter.")
    return config.replace(modules_to_save=[*(config.modules_to_save or ()), *rest])


def _check_prompt(config: PromptMethod, options: Finetune) -> None:
    """Raise ValueError for prompts that this command's data is not for."""
    if config.virtual_tokens and options.data.packing:
        raise ValueError(
            f"{config.peft_type} puts its tokens at the head of a row, where --packing has several texts. Leave "
            "--packing out, or take PREFIX_TUNING."
        )
