"""Loads adapters together with the base models that their configs name."""

import os
from typing import Any

from peft_jax.core.hub import ADAPTER_FILES, HubOptions, find_folder
from peft_jax.core.precision import ComputeDtype
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
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        *,
        subfolder: str | None = None,
        compute_dtype: ComputeDtype | None = None,
        **options: Any,
    ) -> Any:
        """The base model with the adapter, and with as many tokens as that was trained with.

        Args:
            directory: Folder of the adapter, or an id on the Hugging Face hub.
            adapter_name: Name to give it.
            is_trainable: Whether its arrays are trainable.
            config: Its config, instead of the one in the folder.
            revision: Branch, tag or commit of the adapter; the base's is in the adapter's config.
            subfolder: Folder of the adapter in the repository.
            compute_dtype: Element type of the adapter's products, as in `PeftModel.from_pretrained`.
            **options: For the base model's ``from_pretrained``, e.g. ``load_in_8bit=True`` or ``num_labels=3``;
                ``token``, ``cache_dir`` and ``local_files_only`` are for both.

        Raises:
            ValueError: if the config names no base model; also as `PeftModel.from_pretrained`.
        """
        hub: HubOptions = {"revision": revision, "subfolder": subfolder}
        for name in ("token", "cache_dir", "local_files_only"):
            if name in options:
                hub[name] = options[name]
        folder = find_folder(directory, ADAPTER_FILES, hub)
        if config is None:
            config = PeftConfig.from_pretrained(folder)
        base = config.base_model_name_or_path
        if not base:
            raise ValueError(
                f"The adapter in '{directory}' names no base model. Load the base yourself and write "
                "pj.PeftModel.from_pretrained(model, directory)."
            )
        given: dict[str, Any] = {}
        if gguf_file := read_base_file(folder):
            given["gguf_file"] = gguf_file
        if config.revision and not os.path.isdir(base):
            given["revision"] = config.revision
        model = cls.auto.from_pretrained(base, **{**given, **options})
        model = model.resized_for(folder)
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable, config, compute_dtype=compute_dtype)


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
