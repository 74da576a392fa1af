"""Pretrains the small Llama of `peft-jax demo` from scratch on the documentation that CPython carries.

It trains a tokenizer, then the model in float32, prints the held-out loss as it goes and writes a Hugging Face
checkpoint in bfloat16 (3.4 MB). The seed fixes the run; the text is that of the running CPython (3.11.7 for the model
that ships), so another version gives another model. The model that ships is the checkpoint at step 3750 of the 4500:
7.7 million tokens, held-out loss 2.50, 46 minutes on two CPU cores shared with other work.

    python examples/pretrain_demo_model.py --out demo-model
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cpython_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from peft_jax.models import AutoModelForCausalLM, CausalLM, LlamaConfig

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
# Punctuation stays apart from words, so that a name is cut into the same tokens wherever it stands.
WORDS = r""" ?\p{L}+|\p{N}{1,3}|[-=.>"*]{2,}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"""


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """How to pretrain.

    Attributes:
        out: Folder for the checkpoint, written anew at every report so that a run cut off is not lost.
        steps: Training steps.
        batch: Rows in a step.
        length: Tokens in a row.
        learning_rate: Peak learning rate; a warmup leads to it and a cosine from it to zero.
        vocab: Size of the vocabulary.
        report_every: Steps between two reports.
        seed: Seed of the weights and of the order of the text.
    """

    out: Path
    steps: int = 4500
    batch: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    vocab: int = 2048
    report_every: int = 250
    seed: int = 0


def train_tokenizer(pages: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts `<|bos|>` before a text, as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pages, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write the two files from which transformers loads a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def rows(pages: list[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Tokenize pages, end each with `<|eos|>`, and cut them, one after the other, into rows of `length` tokens."""
    eos = [tokenizer.token_to_id(SPECIAL["eos_token"])]
    stream = np.concatenate([encoded.ids + eos for encoded in tokenizer.encode_batch(pages)])
    return stream[: len(stream) // length * length].reshape(-1, length).astype(np.int32)


def batches(tokenizer: Tokenizer, config: Pretraining) -> Iterator[np.ndarray]:
    """Yield batches for ever; each pass over the text has another order and other page styles."""
    epoch = 0
    while True:
        table = rows(cpython_text.training_pages(config.seed + epoch), tokenizer, config.length)
        table = np.random.default_rng(config.seed + epoch).permutation(table)
        for start in range(0, len(table) - config.batch + 1, config.batch):
            yield table[start : start + config.batch]
        epoch += 1


def architecture(config: Pretraining, tokenizer: Tokenizer) -> LlamaConfig:
    """Return a Llama of 1.7 million parameters."""
    ids = {name.replace("token", "token_id"): tokenizer.token_to_id(token) for name, token in SPECIAL.items()}
    return LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=config.length,
        tie_word_embeddings=True,
        **ids,
    )


def main(config: Pretraining) -> None:
    """Train the tokenizer, then the model, and save both."""
    tokenizer = train_tokenizer(cpython_text.training_pages(config.seed), config.vocab)
    save_tokenizer(tokenizer, config.out, config.length)
    held_out = rows(cpython_text.held_out_pages(), tokenizer, config.length)[:64]
    model = AutoModelForCausalLM.from_config(architecture(config, tokenizer), key=jax.random.key(config.seed))
    print(f"{model.num_parameters():,} parameters")

    warmup = min(200, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    opt_state = tx.init(model)

    def loss_fn(model: CausalLM, ids: jax.Array) -> jax.Array:
        return model(ids, labels=ids).loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(model: CausalLM, opt_state: Any, ids: jax.Array) -> tuple[CausalLM, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(model, ids)
        updates, opt_state = tx.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    evaluate = jax.jit(loss_fn)
    losses: list[jax.Array] = []
    start = time.perf_counter()
    for number, ids in zip(range(1, config.steps + 1), batches(tokenizer, config), strict=False):
        model, opt_state, loss = step(model, opt_state, ids)
        losses.append(loss)
        if number % config.report_every == 0 or number == config.steps:
            train = float(np.mean(losses))
            test = float(np.mean([evaluate(model, part) for part in np.split(held_out, 8)]))
            seconds = time.perf_counter() - start
            print(f"step {number}, {seconds:.0f} s: loss {train:.3f}, held-out loss {test:.3f}", flush=True)
            jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model).save_pretrained(config.out)
            losses.clear()


if __name__ == "__main__":
    main(tyro.cli(Pretraining))
