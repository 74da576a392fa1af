"""Loads adapters together with the base models that their configs name."""

import os
from typing import Any

from peft_jax.interop.base_file import read_base_file
from peft_jax.methods.base import PeftConfig
from peft_jax.models.handles import auto
from peft_jax.models.handles.peft_model import PeftModel


class AutoPeftModel:
    """Loads an adapter together with the base model that its config names; each task has a subclass."""

    auto: type[auto.AutoHandle]

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        is_trainable: bool = False,
        adapter_name: str = "default",
        **options: Any,
    ) -> Any:
        """The base model with the adapter, and with as many tokens as that was trained with.

        Args:
            directory: Folder of the adapter.
            is_trainable: Whether its arrays are trainable.
            adapter_name: Name to give it.
            **options: For the base model's ``from_pretrained``, e.g. ``load_in_8bit=True`` or ``num_labels=3``.

        Raises:
            ValueError: if the config names no base model; also as `PeftModel.from_pretrained`.
        """
        base = PeftConfig.from_pretrained(directory).base_model_name_or_path
        if not base:
            raise ValueError(
                f"The adapter in '{directory}' names no base model. Load the base yourself and write "
                "pj.PeftModel.from_pretrained(model, directory)."
            )
        gguf_file = read_base_file(directory)
        model = cls.auto.from_pretrained(base, **{**({"gguf_file": gguf_file} if gguf_file else {}), **options})
        model = model.resized_for(directory)
        return PeftModel.from_pretrained(model, directory, adapter_name=adapter_name, is_trainable=is_trainable)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads an adapter with its base, a causal language model."""

    auto = auto.AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an adapter with its base, a sequence-to-sequence language model."""

    auto = auto.AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads an adapter with its base, a classifier of texts."""

    auto = auto.AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads an adapter with its base, a classifier of tokens."""

    auto = auto.AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an adapter with its base, a model that finds spans."""

    auto = auto.AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an adapter with its base, a bare model."""

    auto = auto.AutoModel
