"""`peft-jax eval`: loss and perplexity of a model on a file, with or without an adapter."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from peft_jax.cli.adapted import ModelOptions, find_tokenizer, load_model
from peft_jax.cli.bar import progress
from peft_jax.cli.checkpoint import apply
from peft_jax.cli.finetune import check_fit
from peft_jax.models.causal_lm import IGNORED_LABEL
from peft_jax.train import evaluate, evaluation_batches, make_evaluation_step, read_records, tokenize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(ModelOptions):
    """Loss and perplexity of a model on the answers in a file."""

    data: Path
    """JSON or JSONL file of records, as finetune takes it."""
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
    records = read_records(options.data)
    data = tokenize(records, find_tokenizer(options.model, options.adapter), cutoff_len=options.cutoff_len)
    model = load_model(options)
    check_fit(data, model.config)
    batches = list(evaluation_batches(data, options.batch_size))
    with progress(batches, len(batches)) as bar:
        loss = evaluate(make_evaluation_step(apply), model, bar)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    targets = int(np.sum(data.labels[:, 1:] != IGNORED_LABEL))
    if options.json:
        found = {"loss": loss, "perplexity": perplexity, "target_tokens": targets}
        print(json.dumps({**found, "examples": len(data), "too_long": data.too_long}))
        return
    left_out = f", {data.too_long} longer than {options.cutoff_len} left out" if data.too_long else ""
    print(f"Data        {len(data)} examples, {targets} tokens of answers{left_out}")
    print(f"Loss        {loss:.4f} nats a token")
    print(f"Perplexity  {perplexity:.4g}")
