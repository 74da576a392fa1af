"""The token that ends an answer: what `finetune` teaches, and where `generate` and a merged checkpoint stop."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from peft_jax.models.config import CAUSAL_LM, SEQ_2_SEQ_LM
from peft_jax.models.handles.base import ModelHandle

H = TypeVar("H", bound=ModelHandle)


class EndsTexts(Protocol):
    """A tokenizer, as far as it says which token ends a text."""

    eos_token_id: Any


def with_end_token(model: H, tokenizer: EndsTexts, turns: Iterable[int] = ()) -> H:
    """The model with the tokenizer's eos among the tokens that end an answer, as transformers' Trainer aligns them.

    The tokens that the checkpoint names stay; a tokenizer without an eos, and a model that writes no text, change
    nothing.

    Args:
        model: A model handle.
        tokenizer: The tokenizer that the adapter is trained with.
        turns: Tokens with which a chat template ends turns; they end answers too, and stand first.

    Example:
        >>> import peft_jax as pj
        >>> from types import SimpleNamespace
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> with_end_token(model, SimpleNamespace(eos_token_id=7)).generation_config["eos_token_id"][0]
        7
    """
    end = tokenizer.eos_token_id
    if end is None or model.task not in (CAUSAL_LM, SEQ_2_SEQ_LM):
        return model
    of_config, of_generation = _listed(model.config.eos_token_id), _listed(end_tokens(model))
    wanted = list(dict.fromkeys((*sorted(turns), end)))
    if end in of_config and set(wanted) <= set(of_generation):
        return model
    aligned: Any = end
    if isinstance(model.config.eos_token_id, tuple):
        aligned = tuple(_first([end], of_config))
    config = dataclasses.replace(model.config, eos_token_id=aligned)
    generation = {**model.generation_config, "eos_token_id": _first(wanted, of_generation)}
    return with_generation_config(dataclasses.replace(model, config=config), generation)


def with_generation_config(model: H, generation_config: Mapping[str, Any]) -> H:
    """The model with other contents of generation_config.json, such as those beside its adapter; unchanged for none."""
    if not generation_config:
        return model
    source = dataclasses.replace(model.source, generation_config=generation_config)
    return dataclasses.replace(model, source=source)


def end_tokens(model: ModelHandle) -> Any:
    """The tokens that end an answer of a model: one, several, or None."""
    return model.generation_config.get("eos_token_id", model.config.eos_token_id)


def _first(ends: list[int], others: list[int]) -> list[int]:
    return list(dict.fromkeys((*ends, *others)))


def _listed(ends: Any) -> list[int]:
    """One token, several, or None as a list."""
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
