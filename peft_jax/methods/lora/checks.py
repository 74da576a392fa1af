"""Checks of a LoRA config's fields, and of those that do not go together."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_jax.methods.lora.initializers.table import TABLE, find


def check_initializer(config: Any) -> None:
    """Make dictionaries of the options of a LoRA config's initializer.

    Raises:
        ValueError: if the initializer is not known, or options are wrong, missing, or for another initializer.
    """
    init = config.init_lora_weights
    chosen = find(init)
    if chosen.frozen and (config.use_dora or config.alora_invocation_tokens):
        raise ValueError(
            f"init_lora_weights={init!r} goes without use_dora and alora_invocation_tokens. Remove one of them."
        )
    for row in TABLE:
        if row.options_field is None or row.options is None:
            continue
        given = getattr(config, row.options_field)
        if given is None and chosen is row and row.options_default:
            given = row.options()
        is_given = given is not None if row.needs == "data" else bool(given)
        if not is_given and chosen is row and row.needs == "weight":
            raise ValueError(
                f"{row.options_field} is not given. Write {row.options_field}={row.options.__name__}(...)."
            )
        if not is_given:
            continue
        # True is what the file of a converted adapter says, beside the options that it was initialized with.
        if chosen is not row and not (init is True and row.needs == "data"):
            raise ValueError(
                f"{row.options_field} goes with init_lora_weights={row.value!r}, got {init!r}. Remove one of them."
            )
        options: Any = given if isinstance(given, row.options) else options_of(row.options, given, row.options_field)
        object.__setattr__(config, row.options_field, dataclasses.asdict(options))


def without_finished_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file without the options of an initializer that is finished: beside True they say nothing.

    PEFT's example of LoftQ leaves such a file.

    Example:
        >>> without_finished_options({"r": 4, "init_lora_weights": True, "loftq_config": {"loftq_bits": 4}})
        {'r': 4, 'init_lora_weights': True}
    """
    if fields.get("init_lora_weights", True) is not True:
        return dict(fields)
    finished = {row.options_field for row in TABLE if row.needs == "weight"}
    return {name: value for name, value in fields.items() if name not in finished}


def check_invocation(config: Any) -> None:
    """Raise ValueError if a LoRA config's invocation is no list of ids, or goes with another variant."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(f"alora_invocation_tokens are the ids of an invocation, at least one, got {tokens!r}.")
    if config.use_dora:
        raise ValueError("alora_invocation_tokens do not go with use_dora=True. Remove one of them.")


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
    if find(config.init_lora_weights).needs != "nothing":
        alone["init_lora_weights"] = config.init_lora_weights
    if given := {field: value for field, value in alone.items() if value}:
        raise ValueError(f"target_parameters do not go with {given}, which are for modules. Remove one of them.")


def options_of(cls: type, fields: Any, name: str) -> Any:
    """The options that a dictionary of a config's field ``name`` holds.

    Raises:
        ValueError: if it is none, or holds others.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{name} is a {cls.__name__}, or a dictionary of its fields, got {fields!r}.")
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{name} does not know {unknown}. It has {known}.")
    return cls(**fields)


def layer_order(ranges: Iterable[Sequence[int]]) -> list[int]:
    """Which of a model's layers stands where, by the ranges of ``layer_replication``.

    Example:
        >>> layer_order([[0, 3], [1, 4]])
        [0, 1, 2, 1, 2, 3]
    """
    return [layer for start, end in ranges for layer in range(start, end)]


def check_replication(config: Any) -> None:
    """Make the ranges of ``layer_replication`` tuples; raise ValueError for what changes the shared weights."""
    if not config.layer_replication:
        return
    ranges = tuple(tuple(one) for one in config.layer_replication)
    if not all(len(one) == 2 and 0 <= one[0] < one[1] for one in ranges):
        raise ValueError(f"layer_replication is a list of ranges [start, end) with 0 <= start < end, got {ranges}.")
    object.__setattr__(config, "layer_replication", ranges)
    shared: dict[str, Any] = {"bias": config.bias} if config.bias != "none" else {}
    if config.target_parameters:
        shared["target_parameters"] = config.target_parameters
    if find(config.init_lora_weights).changes_base:
        shared["init_lora_weights"] = config.init_lora_weights
    if shared:
        raise ValueError(
            f"layer_replication does not go with {shared}, which change weights that replicated layers share. Leave "
            "one of them."
        )
