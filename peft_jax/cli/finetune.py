"""`peft-jax finetune`: train a LoRA adapter on instruction data."""

import dataclasses
import json
from pathlib import Path

import numpy as np

import peft_jax as pj
from peft_jax.cli.bar import progress
from peft_jax.cli.checkpoint import apply, load_tokenizer
from peft_jax.cli.folder import new_folder, refuse_used
from peft_jax.models.llama import LlamaConfig
from peft_jax.train import (
    Tokens,
    make_optimizer,
    make_training_step,
    plot_losses,
    read_records,
    tokenize,
    train,
    training_batches,
)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train a LoRA adapter on instruction data and write it in PEFT's format."""

    model: str
    """Folder (or hub id) of a Hugging Face checkpoint of the Llama family."""
    data: Path
    """JSON or JSONL file of records with instruction, input and output."""
    output: Path
    """Folder to create: adapter, metrics.jsonl and loss.png."""
    load_in_8bit: bool = False
    """Keep the frozen weights in int8."""
    r: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 16
    """The adapter is scaled by lora_alpha / r."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the modules to adapt, or all-linear."""
    max_steps: int = 200
    """Optimizer updates."""
    batch_size: int = 8
    """Examples per update."""
    learning_rate: float = 3e-4
    """Peak of the schedule: linear warm-up, then linear to zero."""
    cutoff_len: int = 256
    """Longest example in tokens; longer ones are left out and counted."""
    seed: int = 0
    """Seed of the adapter's start and of the order of the data."""


def finetune(options: Finetune) -> None:
    """Run the command; every step is a public call.

    Raises:
        ValueError: If an option, the data or the checkpoint is unusable; nothing is left behind.
        OSError: If a file or folder is missing or cannot be written.
    """
    check(options)
    refuse_used(options.output)
    records = read_records(options.data)
    targets = "all-linear" if options.target_modules == ("all-linear",) else list(options.target_modules)
    config = pj.LoraConfig(r=options.r, lora_alpha=options.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = pj.AutoModelForCausalLM.from_pretrained(options.model, load_in_8bit=options.load_in_8bit)
    tokenizer = load_tokenizer(options.model)
    data = tokenize(records, tokenizer, cutoff_len=options.cutoff_len)
    check_fit(data, model.config)
    model = pj.get_peft_model(model, config)

    print(f"{len(data)} examples, padded to {data.length} tokens.", end=" ")
    print(f"{data.too_long} longer than {options.cutoff_len} left out." if data.too_long else "None was too long.")
    model.print_trainable_parameters()
    optimizer = make_optimizer(options.learning_rate, options.max_steps)
    step = make_training_step(apply, optimizer)
    batches = training_batches(data, options.batch_size, seed=options.seed)
    losses = []
    with new_folder(options.output) as folder, open(folder / "metrics.jsonl", "w") as metrics:
        run = train(step, model, optimizer, batches, max_steps=options.max_steps, seed=options.seed)
        with progress(run, options.max_steps) as bar:
            for number, model, loss in bar:  # noqa: B007 (the last model is used after the loop)
                losses.append((number, loss))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                metrics.write(json.dumps({"step": number, "loss": loss}) + "\n")
        model.save_pretrained(folder)
        plot_losses(folder / "loss.png", {"training": losses}, title=f"LoRA r={options.r} on {options.data.name}")
    few = max(1, len(losses) // 10)
    first, last = (np.mean([loss for _, loss in part]) for part in (losses[:few], losses[-few:]))
    print(f"Training loss {first:.3f} -> {last:.3f} (means of the first and last {few} steps).")
    print(f"Wrote {options.output}: adapter_config.json, adapter_model.safetensors, metrics.jsonl, loss.png")


def check_fit(data: Tokens, config: LlamaConfig) -> None:
    """Raise ValueError for tokens that the model has no embedding or no position for."""
    largest = int(data.input_ids.max())
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model has {config.vocab_size} tokens. "
            "Take tokenizer and weights from the same checkpoint."
        )
    if data.length > config.max_position_embeddings:
        raise ValueError(
            f"examples of {data.length} tokens are longer than the model's {config.max_position_embeddings} positions. "
            f"Give --cutoff-len {config.max_position_embeddings} or less."
        )


def check(options: Finetune) -> None:
    """Raise ValueError for numbers that cannot work."""
    for name in ("max_steps", "batch_size", "cutoff_len", "learning_rate"):
        value = getattr(options, name)
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}. Give a number above 0.")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}. Give 0 or a number above.")
