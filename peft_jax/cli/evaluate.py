"""`peft-jax eval`: loss and perplexity of a model on a file, with or without an adapter."""

import dataclasses
import json
import math

import numpy as np

from peft_jax.cli.adapted import ModelOptions, find_tokenizer, load_model
from peft_jax.cli.bar import progress
from peft_jax.cli.checkpoint import apply
from peft_jax.cli.finetune_options import DataOptions
from peft_jax.cli.finetune_setup import check_fit, load_records
from peft_jax.train import Padded, encode, evaluate, evaluation_batches, load_template, make_evaluation_step
from peft_jax.train.encode import IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """Loss and perplexity of a model on the answers in a file."""

    data: str
    """JSON or JSONL file (or hub id of a dataset) of any kind that finetune takes."""
    prompt_template: str = "short"
    """For instruction data: short, alpaca, or a JSON file in alpaca-lora's format."""
    batch_size: int = 8
    """Examples at a time."""
    cutoff_len: int = 256
    """Longest example in tokens; longer ones are left out and counted."""
    json: bool = False
    """Print a JSON object: loss, perplexity, target_tokens, examples, too_long."""


def evaluate_model(options: Eval) -> None:
    """Run the command.

    Raises:
        ValueError: If an option, the data or the checkpoint is unusable.
        OSError: If a file or folder is missing.
    """
    for name in ("batch_size", "cutoff_len"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}. Give a number above 0.")
    records = load_records(DataOptions(data=options.data, prompt_template=options.prompt_template))
    template, tokenizer = load_template(options.prompt_template), find_tokenizer(options.model, options.adapter)
    examples, too_long = encode(records, tokenizer, cutoff_len=options.cutoff_len, template=template)
    data = Padded(examples, options.cutoff_len)
    model = load_model(options)
    check_fit([data], model.config)
    batches = list(evaluation_batches(data, options.batch_size))
    with progress(batches, len(batches)) as bar:
        loss = evaluate(make_evaluation_step(apply), model, bar)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    targets = sum(int(np.sum(example.labels != IGNORE)) for example in examples)
    if options.json:
        found = {"loss": loss, "perplexity": perplexity, "target_tokens": targets}
        print(json.dumps({**found, "examples": len(data), "too_long": too_long}))
        return
    left_out = f", {too_long} longer than {options.cutoff_len} left out" if too_long else ""
    print(f"Data        {len(data)} examples, {targets} tokens of answers{left_out}")
    print(f"Loss        {loss:.4f} nats a token")
    print(f"Perplexity  {perplexity:.4g}")
