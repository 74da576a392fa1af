"""Options of LoRA's starts, as classes of their own; names and defaults are PEFT's. A config holds dictionaries."""

import dataclasses
import re
from typing import Any

STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq")


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """How LoftQ rounds the base.

    Attributes:
        loftq_bits: 4 for NF4, 8 for int8 with a scale for each output.
        loftq_iter: How often grid and factors are found in turns.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8) or self.loftq_iter < 1:
            raise ValueError(f"LoftQ takes loftq_bits=4 or 8, and loftq_iter of at least 1, got {self}.")


def check_start(config: Any) -> None:
    """Make the options of a LoRA config's start dictionaries, and raise ValueError if they do not go with it."""
    init = config.init_lora_weights
    if not isinstance(init, bool) and init not in STARTS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        raise ValueError(
            f"init_lora_weights={init!r} is not supported. Write True, False or one of {', '.join(STARTS)}."
        )
    if config.loftq_config and init != "loftq":
        raise ValueError(f"loftq_config goes with init_lora_weights='loftq', got {init!r}. Leave one of them.")
    if init == "loftq":
        given = config.loftq_config
        options = given if isinstance(given, LoftQConfig) else _from_fields(LoftQConfig, given, "loftq_config")
        object.__setattr__(config, "loftq_config", dataclasses.asdict(options))


def check_invocation(config: Any) -> None:
    """Raise ValueError if a LoRA config's invocation is no list of ids, or goes with another variant."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(f"alora_invocation_tokens are the ids of an invocation, at least one, got {tokens!r}.")
    if config.use_dora:
        raise ValueError("alora_invocation_tokens do not go with use_dora=True. Leave one of them.")


def check_parameters(config: Any) -> None:
    """Raise ValueError if a LoRA config has ``target_parameters`` and what PEFT has for modules alone."""
    if isinstance(config.target_parameters, str):
        raise ValueError(f"target_parameters is a list of names. Write [{config.target_parameters!r}].")
    if not config.target_parameters:
        return
    alone = {
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": config.fan_in_fan_out,
        "lora_bias": config.lora_bias,
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    if config.init_lora_weights not in (True, False, "gaussian"):
        alone["init_lora_weights"] = config.init_lora_weights
    if given := {field: value for field, value in alone.items() if value}:
        raise ValueError(f"target_parameters do not go with {given}, which are for modules. Leave one of them.")


def _from_fields(cls: type, fields: Any, name: str) -> Any:
    if not fields:
        raise ValueError(f"{name} is not given. Write {name}={cls.__name__}(...).")
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{name} does not know {unknown}. It has {known}.")
    return cls(**fields)
