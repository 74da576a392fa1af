"""Model handles with adapters: a base model handle whose tree has adapted leaves."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, Unpack

import jax
import numpy as np

from peft_jax.adapters.attach import apply_adapter
from peft_jax.adapters.input_ids import reads_input_ids, with_input_ids
from peft_jax.core.discarded import warn_if_discarded
from peft_jax.core.hub import ADAPTER_FILES, HubOptions, find_folder
from peft_jax.core.ids import is_outside
from peft_jax.core.merge import disable_adapter, merge, set_adapter, unload
from peft_jax.core.precision import ComputeDtype, in_base_dtype, with_compute_dtype
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import field_names, fields_of
from peft_jax.interop.adapter import adapter_folder, load_adapter, save_adapter
from peft_jax.interop.base_file import write_base_file
from peft_jax.interop.tensors import adapter_config
from peft_jax.interop.xlora_experts import with_experts
from peft_jax.methods.base import Method, PeftConfig
from peft_jax.models.handles.adapter_verbs import AdapterVerbs
from peft_jax.models.handles.base import ModelHandle, register_handle
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.handles.encoders import (
    FeatureExtractor,
    MaskedLM,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM
from peft_jax.models.handles.transformers_keywords import check_device
from peft_jax.models.hub_upload import PushOptions, adapter_card, push
from peft_jax.prompts.attach_prompt import attach_prompt
from peft_jax.prompts.base import PromptMethod
from peft_jax.prompts.xlora import XLoraConfig


def get_peft_model(
    model: ModelHandle,
    peft_config: Method,
    adapter_name: str = "default",
    *,
    key: jax.Array | None = None,
    autocast_adapter_dtype: bool = True,
    compute_dtype: ComputeDtype | None = None,
) -> Any:
    """A new model (a `PeftModel`) with a fresh adapter; the old one is untouched and shares its arrays.

    Args:
        model: A base model, or one with adapters.
        peft_config: The adapter's method, sizes and targets. ``"all-linear"`` excludes the output head, as in PEFT.
        adapter_name: Name of the adapter.
        key: Random key of its initialization; None means ``jax.random.key(0)``.
        autocast_adapter_dtype: Whether the adapter is float32 on a base of half precision, else in the base's dtype.
        compute_dtype: Element type of the adapter's own products, as in `peft_jax.apply_adapter`.

    Raises:
        ValueError: as `peft_jax.apply_adapter`.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        >>> sorted(model.peft_config)
        ['default']
    """
    tokens = getattr(peft_config, "alora_invocation_tokens", None)
    if tokens and (bounds := is_outside(tokens, model.config.vocab_size)):
        raise ValueError(
            f"alora_invocation_tokens are from {bounds[0]} to {bounds[1]}, but the vocabulary has ids 0 to "
            f"{model.config.vocab_size - 1}: such an adapter never counts. Use the tokenizer of this model."
        )
    if isinstance(peft_config, XLoraConfig):
        model, peft_config = with_experts(model, peft_config)
    if isinstance(peft_config, PromptMethod):
        adapted = attach_prompt(model, peft_config, key=key, adapter_name=adapter_name)
        adapted = with_compute_dtype(adapted, compute_dtype, adapter_name)
    else:
        options: dict[str, Any] = {"key": key, "adapter_name": adapter_name, "compute_dtype": compute_dtype}
        adapted = apply_adapter(model, peft_config, **options)
    return PeftModel.of(adapted if autocast_adapter_dtype else in_base_dtype(adapted, adapter_name))


@dataclasses.dataclass(frozen=True, repr=False)
class PeftModel(AdapterVerbs):
    """A model with adapters, which is called and generates like its base; each task has a subclass."""

    base: ClassVar[type[ModelHandle]]

    @staticmethod
    def of(model: ModelHandle) -> Any:
        """A handle on the same parameters as ``model``, of the class for its task."""
        (cls,) = {cls for cls in PEFT_MODELS if cls.base.task == model.task}
        return cls(**fields_of(model, field_names(model)))

    @classmethod
    def from_pretrained(
        cls,
        model: ModelHandle,
        directory: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        compute_dtype: ComputeDtype | None = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        torch_device: str | None = None,
        low_cpu_mem_usage: bool = False,
        ephemeral_gpu_offload: bool = False,
        **hub: Unpack[HubOptions],
    ) -> Any:
        """The model with an adapter from PEFT's files (`peft_jax.interop.load_adapter`).

        Args:
            model: The base model, or one with other adapters.
            directory: Folder of the adapter, or an id on the Hugging Face hub; from its cache where there is no
                network.
            adapter_name: Name to give it.
            is_trainable: Whether its arrays are trainable.
            config: Its config, instead of the one in the folder.
            autocast_adapter_dtype: Whether it is float32 on a base of half precision, else in the base's dtype.
            compute_dtype: Element type of its own products, as in `peft_jax.apply_adapter`.
            key_mapping: Replacements of parts of keys by regexes, as in `peft_jax.interop.load_adapter`.
            ignore_mismatched_sizes: Whether tensors of other shapes are left out and start afresh, with a warning.
            torch_device: Must name the kind of device that the base is on, where the adapter's arrays go in any case.
            low_cpu_mem_usage: Changes nothing: no array is initialized that the file has.
            ephemeral_gpu_offload: Must be False: there is no offloading.
            **hub: Where on the hub, as `peft_jax.core.hub.HubOptions` says: ``subfolder``, ``revision``, ``token``,
                ``cache_dir``, ``local_files_only``.

        Raises:
            FileNotFoundError: if a file is missing, or the hub cannot be reached and its cache has no copy.
            ValueError: if the file does not fit this base, or an argument is not supported.
        """
        if ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload=True is not supported: arrays stay where they are. Leave it out.")
        check_device(torch_device, model.params)
        folder = find_folder(directory, ADAPTER_FILES, hub)
        adapted = load_adapter(
            model.named_for(folder),
            directory,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            compute_dtype=compute_dtype,
            **hub,
        )
        if not autocast_adapter_dtype:
            loaded = adapter_config(adapted.params, adapter_name)
            experts = loaded.experts if isinstance(loaded, XLoraConfig) else ()
            for name in (adapter_name, *experts):
                adapted = in_base_dtype(adapted, name)
        return cls.of(adapted)

    def save_pretrained(  # type: ignore[override]
        self,
        directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write adapters in PEFT's format: ``default`` into the folder, others into folders of their names.

        The name of a GGUF file that the base was read from goes into ``gguf_base.json`` beside each.

        Args:
            directory: Folder to write to; made if need be.
            safe_serialization: Must be True: pickles are not written.
            selected_adapters: Names of those to write; None for all.
            save_embedding_layers: Whether to write the base's embedding and output head too. ``"auto"`` writes those
                that are targets; True does too, or writes both if neither is a target; False writes neither.
            is_main_process: Whether to write at all, where several processes have the same adapter:
                ``jax.process_index() == 0``.
            path_initial_model_for_weight_conversion: As in `peft_jax.interop.save_adapter`.

        Raises:
            ValueError: if an adapter is not there, or as `peft_jax.interop.save_adapter`.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle, which is not written. Leave it out.")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        if missing := [name for name in names if name not in self.peft_config]:
            raise ValueError(
                f"selected_adapters names {missing}, which are not there. Found: {list(self.peft_config)}."
            )
        for name in names if is_main_process else ():
            save_adapter(
                self,
                directory,
                adapter_name=name,
                path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
                save_embedding_layers=save_embedding_layers,
            )
            write_base_file(adapter_folder(directory, name), self.source.gguf_file)

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Write the adapters and a model card, and upload them to a repository of the Hugging Face hub.

        Args:
            repo_id: The repository, which is made if need be.
            **options: As `peft_jax.models.hub_upload.PushOptions` says: ``selected_adapters``, ``token``, ``private``,
                ``revision``, ``commit_message`` and others.

        Returns:
            The address of the commit.

        Raises:
            FileNotFoundError: if the hub cannot be reached, or refuses.
            ValueError: as `save_pretrained`.
        """
        selected = options.pop("selected_adapters", None)

        def write(folder: str) -> str:
            self.save_pretrained(folder, selected_adapters=selected)
            return adapter_card(self)

        return push(repo_id, write, options)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Method,
        *,
        key: jax.Array | None = None,
        autocast_adapter_dtype: bool = True,
        compute_dtype: ComputeDtype | None = None,
    ) -> Self:
        """The model with one fresh adapter more, which is not active while others are.

        Args:
            adapter_name: Its name.
            peft_config: As in `get_peft_model`.
            key: As there.
            autocast_adapter_dtype: As there.
            compute_dtype: As there.

        Raises:
            ValueError: as `peft_jax.apply_adapter`; also if name and config are the wrong way round.
        """
        warn_if_discarded("model.add_adapter(...)")
        if not isinstance(adapter_name, str):
            raise ValueError(f"add_adapter takes a name and a config, got {adapter_name!r} as the name. Swap them.")
        options: dict[str, Any] = {"key": key, "autocast_adapter_dtype": autocast_adapter_dtype}
        options["compute_dtype"] = compute_dtype
        return self._switched_as(get_peft_model(self, peft_config, adapter_name, **options))

    def load_adapter(self, directory: str | os.PathLike[str], adapter_name: str, **options: Any) -> Self:
        """The model with one adapter more from PEFT's files, which is not active while others are.

        Args:
            directory: Folder or hub id of the adapter.
            adapter_name: Name to give it.
            **options: As in `from_pretrained`, such as ``is_trainable=True``.

        Raises:
            FileNotFoundError: as `from_pretrained`.
            ValueError: as there.

        Example:
            >>> import tempfile, peft_jax as pj
            >>> from peft_jax.cli.demo_data import MODEL
            >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
            >>> model = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj"]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     model = model.load_adapter(folder, "again")
            >>> sorted(model.peft_config), model.active_adapters
            (['again', 'default'], ['default'])
        """
        warn_if_discarded("model.load_adapter(...)")
        loaded = type(self).from_pretrained(self, directory, adapter_name=adapter_name, **options)
        return self._switched_as(loaded)

    def _switched_as(self, more: Any) -> Any:
        """A model with one adapter more, with those active that are active here; all if there was none here."""
        if not self.peft_config:
            return more
        active = self.active_adapters
        params = set_adapter(more.params, active) if active else disable_adapter(more.params)
        return more.replace(params)

    def merge_and_unload(self) -> Any:
        """The base model with its active adapters folded in, in dense arrays of the base's dtype."""
        merged = self.base_handle(merge(self.params))
        warn_if_discarded("model.merge_and_unload()")
        return merged

    def unload(self) -> Any:
        """The base model, bit-identical to the one that was adapted; quantized where that was."""
        base = self.base_handle(unload(self.params))
        warn_if_discarded("model.unload()")
        return base

    def base_handle(self, params: PyTree) -> Any:
        """A base model's handle on ``params``."""
        fields = fields_of(self, field_names(self))
        return self.base(**{**fields, "params": params})


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForCausalLM(PeftModel, CausalLM):
    """A causal language model with adapters."""

    base = CausalLM

    def prepared_for(
        self, input_ids: jax.Array | np.ndarray | None, segment_ids: jax.Array | np.ndarray | None = None
    ) -> Self:
        """The model whose adapters that depend on token ids have ``input_ids``."""
        if input_ids is None or not reads_input_ids(self.params):
            return self
        return with_input_ids(self, input_ids, segment_ids)


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForSeq2SeqLM(PeftModel, Seq2SeqLM):
    """A sequence-to-sequence language model with adapters."""

    base = Seq2SeqLM


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForSequenceClassification(PeftModel, SequenceClassifier):
    """A classifier of texts with adapters."""

    base = SequenceClassifier


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForTokenClassification(PeftModel, TokenClassifier):
    """A classifier of tokens with adapters."""

    base = TokenClassifier


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForQuestionAnswering(PeftModel, QuestionAnswerer):
    """A model that finds spans with adapters."""

    base = QuestionAnswerer


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForFeatureExtraction(PeftModel, FeatureExtractor):
    """A bare model with adapters."""

    base = FeatureExtractor


@register_handle
@dataclasses.dataclass(frozen=True, repr=False)
class PeftModelForMaskedLM(PeftModel, MaskedLM):
    """A masked language model with adapters."""

    base = MaskedLM


PEFT_MODELS: tuple[type[PeftModel], ...] = (
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
    PeftModelForMaskedLM,
)
