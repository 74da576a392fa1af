"""The options of `peft-jax finetune`, and which numbers cannot work."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from peft_jax.cli.shared.command_line import Option
from peft_jax.cli.shared.command_line import flag as flag
from peft_jax.cli.shared.common_options import (
    DTYPE,
    GGUF,
    INT4,
    INT8,
    MODEL,
    OUTPUT,
    PROBLEM,
    TASK,
    CompilationOptions,
    Dtype,
    ProblemType,
    TaskName,
)
from peft_jax.cli.shared.data_options import DataFileOptions, check_streaming

TARGETS = Option(aliases=("--lora-target-modules",), of_adapter=True)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    TITLE = "Model"

    model: Annotated[str, MODEL]
    """Folder (or hub id) of a Hugging Face checkpoint of an architecture in docs/models.md."""
    gguf_file: Annotated[str | None, GGUF] = None
    """GGUF file in that folder, which holds weights, config and tokenizer; needs peft-jax[gguf]."""
    task: Annotated[TaskName | None, TASK] = None
    """Task to train it for, by PEFT's name: to continue texts, to answer by encoder and decoder, or to predict classes
    of texts (and numbers, and several classes) or of their words, or spans that answer questions, with a fresh head
    where the checkpoint has none; by default what the adapter or the checkpoint is for."""
    problem_type: Annotated[ProblemType | None, PROBLEM] = None
    """Kind of the labels of SEQ_CLS: single_label_classification, multi_label_classification or regression; by default
    what the checkpoint says, else what the data has: decimal numbers are a regression's, lists several classes."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes that the data numbers, from 0 on, such as O B-PER I-PER; by default LABEL_0 and so on."""
    load_in_8bit: Annotated[bool, INT8] = False
    """Keep the frozen weights in int8."""
    load_in_4bit: Annotated[bool, INT4] = False
    """Keep the frozen weights in nf4, in blocks of 64 (QLoRA)."""
    keep_quantized: bool = False
    """Keep the frozen weights of a base that is quantized already in its own bits, where these have a form here."""
    dtype: Annotated[Dtype | None, DTYPE] = None
    """Element type of the frozen weights; by default that of the checkpoint."""
    remat: Annotated[bool, Option(aliases=("--gradient-checkpointing",))] = False
    """Recompute each layer in the backward pass instead of keeping its activations: less memory, more time."""


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """The adapter: described by options, by a file, or another one to start from."""

    TITLE = "Adapter"

    peft: Annotated[str | None, Option(aliases=("--peft-type",), metavar="NAME")] = None
    """Method, by PEFT's name of it (LORA by default): ADALORA, ADAMSS, ADAPTION_PROMPT, BEFT, BOFT, C3A, CARTRIDGE,
    CPT, DEFT, DELORA, FOURIERFT, FROD, GLORA, GRALORA, HIRA, HRA, IA3, LILY, LN_TUNING, LOHA, LOKR, LORA, MISS,
    MULTITASK_PROMPT_TUNING, OFT, OSF, PEANUT, POLY, PREFIX_TUNING, PROMPT_TUNING, PSOFT, PVERA, P_TUNING, RANDLORA,
    ROAD, SHADOW, SHIRA, SUPERTUNING, TINYLORA, TRAINABLE_TOKENS, UNILORA, VBLORA, VERA, WAVEFT or XLORA."""
    peft_config: Annotated[str | None, Option(metavar="JSON")] = None
    """Fields of the method's config as PEFT names them, such as '{"target_r": 4}', or a JSON file of them."""
    r: Annotated[int | None, Option(aliases=("--rank", "--lora-r", "--lora-rank"))] = None
    """Rank of the adapter, where the method has one (8 by default for LORA)."""
    lora_alpha: Annotated[float | None, Option(of_adapter=True)] = None
    """A LoRA is scaled by lora_alpha / r (16 by default)."""
    lora_dropout: Annotated[float | None, Option(of_adapter=True)] = None
    """Probability of zeroing an input of the adapter in training (0 by default)."""
    target_modules: Annotated[tuple[str, ...] | None, TARGETS] = None
    """Names of the modules to adapt, or all-linear; by default PEFT's for the model's type."""
    adapter_config: Path | None = None
    """A file in the format of PEFT's adapter_config.json, method included, instead of the options above."""
    adapter: Path | None = None
    """Folder of an adapter to train on, instead of a fresh one."""
    compute_dtype: Dtype | None = None
    """Element type of the adapter's own products; by default float32. What is trained and saved stays float32."""
    start_batches: int | None = None
    """Batches of the data that a LoRA looks at whose init_lora_weights is eva, corda or lora_ga (8 by default)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(DataFileOptions):
    """The data and how it is laid out."""

    TITLE = "Data"

    train_on_inputs: bool = False
    """Learn the prompts too, not the responses alone."""
    packing: Annotated[bool, Option(aliases=("--sample-packing",))] = False
    """Fill rows of cutoff-len tokens with several examples each, which do not see each other."""
    val_size: Annotated[float, Option(aliases=("--val-set-size",))] = 0
    """Examples kept apart for validation: a share below 1, or a number of them."""
    streaming: bool = False
    """Read and tokenize the rows of JSONL and Parquet files when a batch needs them, so that data may be larger than
    memory. Not with --packing, --long split, or tasks that predict labels."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The training."""

    TITLE = "Training"

    epochs: Annotated[float | None, Option(aliases=("--num-epochs", "--num-train-epochs"))] = None
    """Passes over the data (3 by default)."""
    max_steps: int | None = None
    """Optimizer updates, instead of epochs."""
    batch_size: int = 8
    """Rows per update."""
    micro_batch_size: int | None = None
    """Rows that go through the model at once, a divisor of the batch size; by default the whole batch."""
    learning_rate: Annotated[float | None, Option(aliases=("--lr",))] = None
    """Peak of the schedule; by default what suits the method, which the run says: 3e-4 for LORA, and 10 to 100 times
    that for prompts."""
    lr_scheduler: Annotated[Literal["linear", "cosine", "constant"], Option(aliases=("--lr-scheduler-type",))] = (
        "linear"
    )
    """Learning rate after the warm-up: falls to zero (linear, cosine), or stays (constant)."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises; by default a twentieth of all, a hundred at most."""
    weight_decay: float = 0
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = 1
    """Norm that gradients are clipped to; 0 for no clipping."""
    no_base_dropout: bool = False
    """Leave the base model's own dropout off, which its config.json asks for and PEFT trains with."""
    optimizer: Annotated[Literal["adamw", "adafactor", "lion", "sgd"], Option(aliases=("--optim",))] = "adamw"
    """Optimizer, from optax."""
    seed: int = 0
    """Seed of the adapter's start, the validation split, the order of the data and dropout."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Several devices, and several processes that train together by the arguments of jax.distributed.initialize."""

    TITLE = "Devices"

    mesh: Annotated[str | None, Option(metavar="AXES")] = None
    """Several devices, such as data=4,fsdp=2,tensor=1: data, fsdp and expert split the batch; fsdp, expert and tensor
    the weights; expert and tensor the number of experts of a mixture."""
    coordinator_address: Annotated[str | None, Option(metavar="HOST:PORT")] = None
    """Address and port of process 0, such as 10.0.0.1:1234; in the environment JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """How many processes there are; in the environment JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Number of this process, from 0 on; in the environment JAX_PROCESS_ID."""
    distributed: bool = False
    """Join the others by the environment alone: by these variables, or by those of Slurm, Open MPI, Kubernetes or a TPU
    pod."""
    initialization_timeout: int = 300
    """Seconds to wait for the others."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Files to write, and when."""

    TITLE = "Output"

    output: Annotated[Path, OUTPUT]
    """Folder to create: adapter, best/ by validation loss, checkpoints/, metrics.jsonl, loss.png, README.md, the
    tokenizer, generation_config.json, training_layout.json, run.yaml for --config, and of classes labels.json."""
    eval_steps: int | None = None
    """Steps between evaluations; by default once an epoch. The last step is always evaluated."""
    early_stopping: Annotated[int | None, Option(aliases=("--early-stopping-patience",))] = None
    """Stop after this number of evaluations without a better validation loss."""
    save_steps: int = 100
    """Steps between checkpoints. The last step is always saved."""
    save_total_limit: int = 2
    """How many checkpoints are kept."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder, with the settings it was made with."""
    config: Path | None = None
    """YAML file of options by their names here, such as the run.yaml of another run; flags beside it count more."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (needs peft-jax[tensorboard])."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train an adapter on your data and write it in PEFT's format."""

    base: ModelOptions
    adapter: AdapterOptions
    data: DataOptions
    training: TrainingOptions
    processes: ProcessOptions
    compilation: CompilationOptions
    run: RunOptions


# Options that change nothing in the numbers of a run, so that it may go on with others.
FREE = (
    *("output", "resume", "tensorboard", "save_total_limit", "mesh", "config"),
    *("compilation_cache", "no_compilation_cache"),
    *("coordinator_address", "num_processes", "process_id", "distributed", "initialization_timeout"),
)


def each(options: Finetune) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of every option."""
    for group in dataclasses.fields(options):
        for field in dataclasses.fields(getattr(options, group.name)):
            yield field.name, getattr(getattr(options, group.name), field.name)


def settings(options: Finetune) -> dict[str, Any]:
    """Return the options that a run goes on with, as JSON has them."""
    return {name: _plain(value) for name, value in each(options) if name not in FREE}


def check(options: Finetune) -> None:
    """Raise ValueError for numbers that cannot work, and for options that exclude each other."""
    given = dict(each(options))
    for name in ABOVE_ZERO:
        if given[name] is not None and not given[name] > 0:
            raise ValueError(f"{flag(name)} is {given[name]}. Give a number above 0.")
    for name in ("weight_decay", "max_grad_norm", "seed", "val_size", "warmup_steps"):
        if given[name] is not None and not given[name] >= 0:
            raise ValueError(f"{flag(name)} is {given[name]}. Give 0 or a number above.")
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag(name)} is {value}. Give a finite number.")
    if given["seed"] >= 2**32:
        raise ValueError(f"--seed is {given['seed']}. Give a number below 2**32.")
    if given["val_size"] >= 1 and given["val_size"] % 1:
        raise ValueError(f"--val-size is {given['val_size']}. Give a share below 1 or a whole number of examples.")
    if given["batch_size"] % (given["micro_batch_size"] or given["batch_size"]):
        raise ValueError(
            f"--micro-batch-size {given['micro_batch_size']} does not divide --batch-size {given['batch_size']}."
            " Give a divisor."
        )
    for one, others in EXCLUSIVE.items():
        for other in others:
            if given[one] is not None and given[other] is not None:
                raise ValueError(f"{flag(one)} and {flag(other)} exclude each other. Give one of them.")
    check_streaming(given)
    if not given["val_size"]:
        for name in ("eval_steps", "early_stopping"):
            if given[name] is not None:
                raise ValueError(f"{flag(name)} needs examples for validation. Give --val-size, such as 0.1.")


ABOVE_ZERO = (
    *("epochs", "max_steps", "batch_size", "micro_batch_size", "cutoff_len", "learning_rate"),
    *("eval_steps", "early_stopping", "save_steps", "save_total_limit", "start_batches"),
    *("num_processes", "initialization_timeout"),
)
DESCRIBED = ("r", "lora_alpha", "lora_dropout", "target_modules")
EXCLUSIVE = {
    "adapter_config": ("peft", "peft_config", *DESCRIBED),
    "adapter": ("peft", "peft_config", *DESCRIBED, "adapter_config", "start_batches", "label_names"),
    "epochs": ("max_steps",),
}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value
