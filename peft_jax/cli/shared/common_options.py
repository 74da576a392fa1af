"""Options that several commands have, with the flags of alpaca-lora, TRL, axolotl and PEFT's examples for them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from peft_jax.cli.shared.command_line import Option

Dtype = Literal["float32", "bfloat16", "float16"]
TaskName = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

MODEL = Option(aliases=("--base-model", "--model-name-or-path"), metavar="MODEL")
GGUF = Option(metavar="FILE")
ADAPTER = Option(aliases=("--adapter-path", "--lora-weights"))
INT8 = Option(aliases=("--load-8bit",))
INT4 = Option(aliases=("--load-4bit",))
DTYPE = Option(aliases=("--torch-dtype",), presets={"--bf16": "bfloat16", "--fp16": "float16"})
DATA = Option(aliases=("--data-path", "--dataset", "--dataset-name"), metavar="DATA", repeatable=True)
TEMPLATE = Option(aliases=("--prompt-template-name",), metavar="NAME")
CUTOFF = Option(aliases=("--max-length", "--max-seq-length", "--sequence-len"))
TASK = Option(aliases=("--task-type",))
PROBLEM = Option(metavar="KIND")
OUTPUT = Option(aliases=("--output-dir",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model a command runs."""

    TITLE = "Model"

    model: Annotated[str | None, MODEL] = None
    """Folder (or hub id) of the base model; by default the one that the adapter names."""
    gguf_file: Annotated[str | None, GGUF] = None
    """GGUF file in that folder, which holds weights, config and tokenizer; by default the one that the adapter was
    trained on, if --model is not given."""
    adapter: Annotated[Path | None, ADAPTER] = None
    """Folder of an adapter in PEFT's format; without it the base runs alone."""
    load_in_8bit: Annotated[bool, INT8] = False
    """Keep the base's weights in int8."""
    load_in_4bit: Annotated[bool, INT4] = False
    """Keep the base's weights in nf4, in blocks of 64 (QLoRA)."""
    keep_quantized: bool = False
    """Keep the weights of a base that is quantized already in its own bits, where these have a form here."""
    dtype: Annotated[Dtype | None, DTYPE] = None
    """Element type of the base's weights; by default the checkpoint's own."""
    compute_dtype: Dtype | None = None
    """Element type of the adapter's own products; by default float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilationOptions:
    """Where compiled programs are kept."""

    TITLE = "Compilation"

    compilation_cache: Annotated[Path | None, Option(metavar="FOLDER")] = None
    """Folder that keeps compiled programs for the next start; by default JAX_COMPILATION_CACHE_DIR, or
    peft_jax/compiled in the user's cache folder."""
    no_compilation_cache: bool = False
    """Keep no compiled programs, and read none."""
