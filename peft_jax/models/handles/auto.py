"""Makes model handles for the architecture that a checkpoint's config names."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.hub import HubOptions
from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.models.config import ModelConfig
from peft_jax.models.gguf_checkpoint import base_config, base_files
from peft_jax.models.handles.base import ModelHandle, Source
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.handles.encoders import (
    FeatureExtractor,
    MaskedLM,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from peft_jax.models.handles.label_losses import PROBLEMS
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM
from peft_jax.models.handles.transformers_keywords import element_type, hub_options
from peft_jax.models.registry import family_of, read_architecture
from peft_jax.models.weights_io import read_generation_config, read_model
from peft_jax.quant.bitsandbytes_config import BitsAndBytesConfig

Path = str | os.PathLike[str]


class AutoHandle:
    """Makes models of one task from checkpoints or configs; a subclass names the task by the class of its handles."""

    handle: Any

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path,
        *,
        dtype: str | jnp.dtype | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        quantization_config: BitsAndBytesConfig | None = None,
        keep_quantized: bool = False,
        gguf_file: str | None = None,
        remat: bool = False,
        key: jax.Array | None = None,
        torch_dtype: Any = None,
        **keywords: Any,
    ) -> Any:
        """Read a Hugging Face checkpoint; a head (or pooler) that it lacks is initialized at random, with a warning.

        The weights of a quantized checkpoint (`peft_jax.interop.quantized`) are dequantized unless ``keep_quantized``
        is True. A warning says what became of them.

        Args:
            name_or_path: Folder, or id on the Hugging Face hub.
            dtype: Element type of the parameters; None for the one that config.json names.
            load_in_8bit: Quantize the layers' matmul weights while they are read, tensor by tensor; embeddings,
                norms and the output head stay in float.
            gguf_file: Name of a GGUF file in the folder, which is read instead of its other files and dequantized
                tensor by tensor unless ``keep_quantized`` is True (needs peft-jax[gguf]). A warning says how many bytes
                the weights then take.
            load_in_4bit: The same in NF4, in blocks of 64 (QLoRA), without double quantization.
            quantization_config: The same with all options of transformers' ``BitsAndBytesConfig``.
            keep_quantized: Whether the matrices of a checkpoint that is quantized already stay in its own bits, where a
                weight of `peft_jax.quant` holds them exactly, as transformers keeps them. The others are dequantized.
            remat: Whether backward recomputes each layer instead of keeping its activations.
            key: Random key of a head that the checkpoint lacks; None means ``jax.random.key(0)``.
            torch_dtype: Another name of ``dtype``.
            **keywords: Where on the hub, as `peft_jax.core.hub.HubOptions` says: ``revision``, ``subfolder``,
                ``token``, ``cache_dir``, ``local_files_only``. Other arguments of transformers are an error that says
                what to write instead, unless they ask for what is done here in any case.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
            ValueError: if a file is damaged, the architecture is not supported or not for this task, or tensors do not
                fit the config.
        """
        return cls._read(
            name_or_path,
            remat,
            hub_options(keywords),
            dtype=element_type(dtype, torch_dtype),
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            quantization_config=quantization_config,
            keep_quantized=keep_quantized,
            gguf_file=gguf_file,
            key=key,
        )

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        key: jax.Array | None = None,
        dtype: str | jnp.dtype = "float32",
        remat: bool = False,
    ) -> Any:
        """A model with random parameters.

        Args:
            config: The architecture: a config of `peft_jax.models` or of transformers, or the dict of a config.json.
            key: Random key; None means ``jax.random.key(0)``.
            dtype: Element type of the parameters.
            remat: As in `from_pretrained`.

        Raises:
            ValueError: if the architecture is not supported, or not for this task.

        Example:
            >>> from peft_jax.models import LlamaConfig
            >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            ...                      num_attention_heads=2)
            >>> AutoModelForCausalLM.from_config(config).num_parameters()
            1384
        """
        known = config if isinstance(config, ModelConfig) else read_architecture(config)
        config = dataclasses.replace(known, task_type=cls.handle.task)
        params = family_of(config).init_params(config, jax.random.key(0) if key is None else key, jnp.dtype(dtype))
        return cls.handle(params, config, remat=remat)

    @classmethod
    def _read(
        cls,
        name_or_path: Path,
        remat: bool,
        hub: HubOptions,
        id2label: Mapping[int, str] | None = None,
        **options: Any,
    ) -> ModelHandle:
        gguf_file = options.get("gguf_file")
        folder = find_checkpoint(name_or_path, base_files(gguf_file), hub)
        config, params, fresh = read_model(folder, task_type=cls.handle.task, **options)
        saved_labels = base_config(folder, gguf_file).get("id2label") or {}
        if id2label is None and len(saved_labels) == config.num_labels:
            id2label = {int(number): label for number, label in saved_labels.items()}
        generation = read_generation_config(folder) if gguf_file is None else {}
        source = Source(os.fspath(name_or_path), generation, id2label or {}, fresh, gguf_file)
        handle: ModelHandle = cls.handle(params, config, source, remat)
        return handle


class AutoModelForCausalLM(AutoHandle):
    """Makes causal language models of decoders.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
        >>> model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"].q.dtype
        dtype('int8')
    """

    handle = CausalLM


class AutoModel(AutoHandle):
    """Makes bare models, whose outputs are hidden states, of encoders and of decoders."""

    handle = FeatureExtractor


class AutoModelForSeq2SeqLM(AutoHandle):
    """Makes sequence-to-sequence language models, of encoder-decoders.

    With float16 the leaves that would overflow stay float32, as in transformers.
    """

    handle = Seq2SeqLM


class AutoModelForMaskedLM(AutoHandle):
    """Makes masked language models, of encoders."""

    handle = MaskedLM


class AutoModelForQuestionAnswering(AutoHandle):
    """Makes models that find spans, of encoders and of some decoders."""

    handle = QuestionAnswerer


class _AutoClassifier(AutoHandle):
    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        problem_type: str | None = None,
        dtype: str | jnp.dtype | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        quantization_config: BitsAndBytesConfig | None = None,
        keep_quantized: bool = False,
        gguf_file: str | None = None,
        remat: bool = False,
        key: jax.Array | None = None,
        torch_dtype: Any = None,
        **keywords: Any,
    ) -> Any:
        """Read a Hugging Face checkpoint; a head that it lacks is initialized at random, with a warning.

        Args:
            name_or_path: Folder, or id on the Hugging Face hub.
            num_labels: The number of the head's outputs; None for the number in config.json, or 2.
            id2label: The names of the outputs, instead of their number.
            problem_type: For classifiers of texts "regression", "single_label_classification" or
                "multi_label_classification"; None for the one in config.json, or else by the labels.
            dtype: Element type of the parameters; None for the one that config.json names.
            load_in_8bit: Quantize the layers' matmul weights while they are read, tensor by tensor; embeddings,
                norms and the output head stay in float.
            gguf_file: Name of a GGUF file in the folder, which is read instead of its other files and dequantized
                tensor by tensor unless ``keep_quantized`` is True (needs peft-jax[gguf]). A warning says how many bytes
                the weights then take.
            load_in_4bit: The same in NF4, in blocks of 64 (QLoRA), without double quantization.
            quantization_config: The same with all options of transformers' ``BitsAndBytesConfig``.
            keep_quantized: Whether the matrices of a checkpoint that is quantized already stay in its own bits, where a
                weight of `peft_jax.quant` holds them exactly, as transformers keeps them. The others are dequantized.
            remat: Whether backward recomputes each layer instead of keeping its activations.
            key: Random key of a head that the checkpoint lacks; None means ``jax.random.key(0)``.
            torch_dtype: Another name of ``dtype``.
            **keywords: Where on the hub, as `peft_jax.core.hub.HubOptions` says: ``revision``, ``subfolder``,
                ``token``, ``cache_dir``, ``local_files_only``. Other arguments of transformers are an error that says
                what to write instead, unless they ask for what is done here in any case.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
            ValueError: if a file is damaged, the architecture is not supported or not for this task, tensors do not
                fit the config, or an argument is out of range.
        """
        if id2label is not None and num_labels not in (None, len(id2label)):
            raise ValueError(f"num_labels={num_labels}, but id2label has {len(id2label)} names. Give one of them.")
        if id2label is not None and sorted(id2label) != list(range(len(id2label))):
            raise ValueError(f"id2label names the classes {sorted(id2label)}. Name 0 to {len(id2label) - 1}.")
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"num_labels is at least 1, got {num_labels}.")
        if problem_type not in (None, *PROBLEMS):
            raise ValueError(f"problem_type is one of {', '.join(PROBLEMS)}, got {problem_type!r}.")
        changes: dict[str, Any] = {}
        if id2label is not None:
            changes["num_labels"] = len(id2label)
        elif num_labels is not None:
            changes["num_labels"] = num_labels
        if problem_type is not None:
            changes["problem_type"] = problem_type
        return cls._read(
            name_or_path,
            remat,
            hub_options(keywords),
            id2label,
            dtype=element_type(dtype, torch_dtype),
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            quantization_config=quantization_config,
            keep_quantized=keep_quantized,
            gguf_file=gguf_file,
            key=key,
            **changes,
        )


class AutoModelForSequenceClassification(_AutoClassifier):
    """Makes classifiers and regressors of texts, of encoders and of decoders."""

    handle = SequenceClassifier


class AutoModelForTokenClassification(_AutoClassifier):
    """Makes classifiers of tokens, of encoders and of decoders."""

    handle = TokenClassifier
