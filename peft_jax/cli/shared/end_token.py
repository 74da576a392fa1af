"""The token that ends an answer: what `finetune` teaches, and where `generate` and a merged checkpoint stop."""

import dataclasses
from typing import Any, Protocol, TypeVar

from peft_jax.models.config import CAUSAL_LM, SEQ_2_SEQ_LM
from peft_jax.models.handles.base import ModelHandle

H = TypeVar("H", bound=ModelHandle)


class EndsTexts(Protocol):
    """A tokenizer, as far as it says which token ends a text."""

    eos_token_id: Any


def with_end_token(model: H, tokenizer: EndsTexts) -> H:
    """The model with the tokenizer's eos among the tokens that end an answer, as transformers' Trainer aligns them.

    The tokens that the checkpoint names stay; a tokenizer without an eos, and a model that writes no text, change
    nothing.

    Args:
        model: A model handle.
        tokenizer: The tokenizer that the adapter is trained with.

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
    if end in of_config and end in of_generation:
        return model
    aligned: Any = end
    if isinstance(model.config.eos_token_id, tuple):
        aligned = tuple(_first(end, of_config))
    config = dataclasses.replace(model.config, eos_token_id=aligned)
    generation = {**model.generation_config, "eos_token_id": _first(end, of_generation)}
    source = dataclasses.replace(model.source, generation_config=generation)
    return dataclasses.replace(model, config=config, source=source)


def end_tokens(model: ModelHandle) -> Any:
    """The tokens that end an answer of a model: one, several, or None."""
    return model.generation_config.get("eos_token_id", model.config.eos_token_id)


def _first(end: int, others: list[int]) -> list[int]:
    return [end, *(other for other in others if other != end)]


def _listed(ends: Any) -> list[int]:
    """One token, several, or None as a list."""
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
