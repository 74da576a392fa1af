"""Configs of Hugging Face, as dicts: what is in them, their defaults, and what they may say."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax.core.config_ranges import check_raw
from peft_jax.core.short_errors import shortened
from peft_jax.core.strict_json import shown
from peft_jax.interop.quantized import check_quant_method


def as_dict(hf: Any) -> dict[str, Any]:
    """A Hugging Face config, dict or object, as a new dict.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(hf, Mapping):
        return dict(hf)
    if not hasattr(hf, "to_dict"):
        raise ValueError(
            f"{hf!r} is no config. Give one of peft_jax.models or of transformers, or the dict of a config.json. "
            "A checkpoint is read by from_pretrained."
        )
    return dict(hf.to_dict())


def complete(hf: Any, known: Iterable[str]) -> dict[str, Any]:
    """All fields of a Hugging Face config, defaults and old spellings as transformers reads them.

    Args:
        hf: The dict of a config.json (of any transformers version) or a transformers config object.
        known: Model types that are supported.

    Raises:
        ValueError: if the model type is not one of these, or the checkpoint is quantized in a way that is not read.
    """
    raw = copy.deepcopy(as_dict(hf))  # transformers adds to nested dicts
    kind = raw.pop("model_type", None)
    check_model_type(kind, known)
    if quantization := raw.pop("quantization_config", None):
        check_quant_method(quantization)
    # Imported here: it takes seconds, and a model that was not read from a checkpoint does not need it.
    from transformers import AutoConfig

    check_raw(raw)
    try:
        return {**AutoConfig.for_model(kind, **raw).to_dict(), "model_type": kind}
    except Exception as error:  # its checks raise several kinds, and arithmetic on odd values more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"this is no config of a {kind} model, according to transformers: {shortened(reason)} Correct config.json."
        ) from error


def text_part(hf: Any, kind: str, text_kind: str) -> dict[str, Any]:
    """The config of the text model in that of a multimodal one.

    Args:
        hf: The dict of a config.json or a transformers config object.
        kind: The model type that it is of.
        text_kind: The model type of its text model.

    Raises:
        ValueError: if the model type is another one.

    Example:
        >>> text_part({"model_type": "both", "text_config": {"hidden_size": 8}, "eos_token_id": 1}, "both", "text")
        {'hidden_size': 8, 'eos_token_id': 1, 'model_type': 'text'}
    """
    raw = as_dict(hf)
    check_model_type(raw.get("model_type"), (kind,))
    text = raw.get("text_config") or {}
    if not isinstance(text, Mapping) and not hasattr(text, "to_dict"):
        raise ValueError(f"text_config={shown(text)} is not supported. Write the text model's config.")
    text = as_dict(text)
    outer = ("eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
    text |= {name: raw[name] for name in outer if raw.get(name) is not None}
    return {**text, "model_type": text_kind}


def check_model_type(model_type: Any, known: Iterable[str]) -> str:
    """The model type, or ValueError if it is not one of the known ones."""
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"model_type={shown(model_type)} is not supported. Supported: {', '.join(known)}.")
    return str(model_type)


def check_fixed(full: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError if a field of a Hugging Face config has not the one value of it that is supported."""
    for name, only in fixed.items():
        if full.get(name, only) != only:
            raise ValueError(f"{name}={full[name]!r} is not supported, only {only!r}.")


def numbered_labels(count: int) -> dict[int, str]:
    """The names of labels that nobody named, as transformers gives them.

    Example:
        >>> numbered_labels(2)
        {0: 'LABEL_0', 1: 'LABEL_1'}
    """
    return {number: f"LABEL_{number}" for number in range(count)}


def label_fields(id2label: Mapping[int, str]) -> dict[str, Any]:
    """The names of labels as entries of a config.json.

    Example:
        >>> label_fields({0: "no", 1: "yes"})
        {'id2label': {'0': 'no', '1': 'yes'}, 'label2id': {'no': 0, 'yes': 1}}
    """
    return {
        "id2label": {str(number): label for number, label in id2label.items()},
        "label2id": {label: number for number, label in id2label.items()},
    }
