"""The options of all commands but finetune. They import nothing that takes long, so that help is quick."""

import dataclasses
from pathlib import Path
from typing import Annotated

from peft_jax.cli.shared.command_line import Option
from peft_jax.cli.shared.common_options import (
    ADAPTER,
    DTYPE,
    GGUF,
    MODEL,
    OUTPUT,
    PROBLEM,
    TASK,
    TEMPLATE,
    CompilationOptions,
    Dtype,
    ModelOptions,
    ProblemType,
    TaskName,
)
from peft_jax.cli.shared.data_options import DataFileOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompts that a model continues."""

    TITLE = "Prompts"

    prompts: Annotated[tuple[str, ...], Option(positional=True, metavar="PROMPT")] = ()
    """The prompts; without any, and without --file, the lines of standard input."""
    file: Path | None = None
    """Prompts in a file: .json or .jsonl (texts, or objects with instruction and input, prompt, or messages), else a
    prompt a line."""
    prompt_template: Annotated[str | None, TEMPLATE] = None
    """Template around texts and instructions: chat, raw, short, alpaca, or a JSON file, as in finetune; by default that
    of the adapter's training, else chat where the tokenizer has a chat template, else short."""
    task_id: int | None = None
    """The task of the prompts, by its number, for an adapter that has several."""
    batch_size: int = 8
    """Prompts that are continued at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How tokens are chosen."""

    TITLE = "Decoding"

    max_new_tokens: Annotated[int | None, Option(aliases=("--max-tokens",))] = None
    """Longest answer in tokens; by default 256, or what the model's positions leave."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    greedy: bool = False
    """Take the likeliest token, also where generation_config.json asks for drawing."""
    temperature: Annotated[float | None, Option(aliases=("--temp",))] = None
    """Divides the logits before drawing."""
    top_k: int | None = None
    """Sample from this number of the likeliest tokens; 0 for all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens of this probability."""
    min_p: float | None = None
    """Draw from tokens of at least this share of the likeliest's probability."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens less likely that were there already."""
    stop_token: Annotated[tuple[str, ...], Option(repeatable=True, metavar="TOKEN")] = ()
    """A token that ends an answer, beside the model's own; may be given several times."""
    ignore_generation_config: bool = False
    """Leave generation_config.json aside."""
    seed: int = 0
    """Seed of the drawing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(PromptOptions, ModelOptions, DecodingOptions, CompilationOptions):
    """Continue or answer prompts; what is not given here is as the checkpoint's generation_config.json says."""

    TITLE = "Output"

    json: bool = False
    """Print a JSON object a line: prompt, text, tokens, finish_reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions, CompilationOptions, DataFileOptions):
    """Loss and perplexity of a model on the answers in a file; of a model with another head loss and scores."""

    TITLE = "Evaluation"

    batch_size: int = 8
    """Examples at a time."""
    json: bool = False
    """Print a JSON object: loss, perplexity, target_tokens, examples, too_long; of other heads accuracy, f1,
    exact_match, pearson and the like, and no tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview(DataFileOptions):
    """Show the tokens that finetune would make of data, and which of them are learned; reads no weights."""

    TITLE = "Preview"

    model: Annotated[str, MODEL]
    """Folder (or hub id) of the model, of which config and tokenizer are read."""
    gguf_file: Annotated[str | None, GGUF] = None
    """GGUF file in that folder, of which the metadata are read."""
    task: Annotated[TaskName | None, TASK] = None
    """Task to train it for, as in finetune."""
    problem_type: Annotated[ProblemType | None, PROBLEM] = None
    """Kind of the labels of SEQ_CLS, as in finetune."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes that the data numbers, as in finetune."""
    train_on_inputs: bool = False
    """Learn the prompts too, as in finetune."""
    streaming: bool = False
    """Read the first 1,024 records of each JSONL or Parquet file alone, as finetune --streaming does before it
    starts."""
    examples: int = 3
    """How many examples are shown, from the first on."""
    html: Path | None = None
    """Write a page of HTML too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(CompilationOptions):
    """Fold an adapter into its base and write a checkpoint that transformers loads."""

    adapter: Annotated[Path, ADAPTER]
    """Folder of an adapter in PEFT's format."""
    output: Annotated[Path, OUTPUT]
    """Folder to create: weights, config.json and the tokenizer's files."""
    model: Annotated[str | None, MODEL] = None
    """Folder (or hub id) of the base model; by default the one that the adapter names."""
    gguf_file: Annotated[str | None, GGUF] = None
    """GGUF file in that folder; by default the one that the adapter was trained on, if --model is not given."""
    dtype: Annotated[Dtype | None, DTYPE] = None
    """Element type of the written weights; by default the base's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what an adapter's folder holds and who takes it; reads JSON and the header of the tensors alone."""

    adapter: Annotated[Path, Option(positional=True)]
    """Folder of an adapter in PEFT's format, of any method."""
    model: Annotated[str | None, MODEL] = None
    """Folder (or hub id) of a base model to hold it against; only its config.json is read."""
    gguf_file: Annotated[str | None, GGUF] = None
    """GGUF file in that folder, of which only the metadata are read."""
    json: bool = False
    """Print a JSON object instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(CompilationOptions):
    """Fine-tune a small checkpoint that ships with the package; needs no network."""

    output: Annotated[Path, OUTPUT] = Path("demo-output")
    """Folder to create: adapter, merged checkpoint and loss curve."""
