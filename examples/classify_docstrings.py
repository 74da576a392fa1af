"""Teach a frozen BERT to recognise the package of Python's standard library that a docstring is from.

    python examples/classify_docstrings.py

Without `--model` it first pretrains a small BERT on masked tokens of the same docstrings, as there is nothing to
download: a minute or two on two CPU cores. Then it trains, on the same frozen encoder, the head alone, a LoRA, and
P-tuning v2 (a prefix of keys and values in every layer), each with a head of its own, and prints accuracy on docstrings
of names that training never saw, beside that of the untuned model. `--model` takes any BERT or RoBERTa.
"""

import collections
import dataclasses
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cpython_text
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from text_rows import TextRows
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertTokenizerFast

import peft_jax as pj
from peft_jax.models import BertConfig

VIRTUAL = 16  # tokens of the prefix
METHODS = {
    "LoRA": pj.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "P-tuning v2": pj.PrefixTuningConfig(num_virtual_tokens=VIRTUAL, task_type="SEQ_CLS"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train, and for how long.

    Attributes:
        model: Folder (or hub id) of a BERT or RoBERTa; a small one is pretrained if none is given.
        pretraining_steps: Steps of that.
        steps: Steps of each adapter.
        batch_size: Texts in a step.
        length: Tokens of a text.
        classes: Packages to distinguish, those with most docstrings.
        learning_rate: Peak of the adapters' learning rate.
    """

    model: str | None = None
    pretraining_steps: int = 600
    steps: int = 400
    batch_size: int = 32
    length: int = 48
    classes: int = 6
    learning_rate: float = 5e-3


def read_texts(classes: int) -> tuple[list[str], list[tuple[str, int]], list[tuple[str, int]]]:
    """The names of the packages, and the first lines of docstrings with their classes: to train on, and held out."""
    found = [(f.module.split(".")[0], f.name, " ".join(f.doc.split())) for f in cpython_text.functions() if f.doc]
    names = [name for name, _ in collections.Counter(package for package, _, _ in found).most_common(classes)]
    parts: tuple[list[tuple[str, int]], ...] = ([], [])
    for package, name, doc in found:
        if package in names:
            parts[cpython_text.is_held_out(name)].append((doc, names.index(package)))
    return names, *parts


def encode(pairs: list[tuple[str, int]], tokenizer: Any, length: int) -> TextRows:
    """Token ids of texts, padded on the right."""
    rows = tokenizer([text for text, _ in pairs], padding="max_length", truncation=True, max_length=length)
    return TextRows(
        np.array(rows["input_ids"]), np.array(rows["attention_mask"]), np.array([label for _, label in pairs])
    )


def pretrain(folder: Path, pairs: list[tuple[str, int]], options: Options) -> None:
    """Write a BERT that has learned to fill in masked tokens of these texts."""
    wordpieces = BertWordPieceTokenizer(lowercase=True)
    wordpieces.train_from_iterator([text for text, _ in pairs], vocab_size=2048, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=wordpieces._tokenizer)
    tokenizer.save_pretrained(folder)
    texts = encode(pairs, tokenizer, options.length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=options.length + VIRTUAL,
    )
    model = pj.AutoModelForMaskedLM.from_config(config)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 2e-3, 50, max(options.pretraining_steps, 51)))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(model: Any, state: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array, first: int) -> Any:
        at = first + jnp.broadcast_to(jnp.arange(options.length), ids.shape)  # so that all positions are learned
        loss, grads = jax.value_and_grad(lambda model: model(ids, mask, position_ids=at, labels=labels).loss)(model)
        updates, state = optimizer.update(grads, state, model)
        return optax.apply_updates(model, updates), state, loss

    state, rng, losses = optimizer.init(model), np.random.default_rng(0), []
    for _ in range(options.pretraining_steps):
        ids, mask, _ = texts.batch(rng, options.batch_size)
        masked = (rng.random(ids.shape) < 0.15) & (mask == 1)
        labels = np.where(masked, ids, -100)
        ids = np.where(masked, tokenizer.mask_token_id, ids)
        model, state, loss = step(model, state, ids, mask, labels, rng.integers(VIRTUAL + 1))
        losses.append(float(loss))
    print(f"pretrained: loss {losses[0]:.2f} -> {np.mean(losses[-50:]):.2f}")
    model.save_pretrained(folder)


def train(model: Any, trained: Any, frozen: Any, texts: TextRows, options: Options) -> Any:
    """The model after training its first partition and keeping the other."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps), weight_decay=0.0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any, frozen: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> Any:
        grads = jax.grad(lambda trained: pj.combine(trained, frozen)(ids, mask, labels=labels).loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    state, rng = optimizer.init(trained), np.random.default_rng(1)
    for _ in range(options.steps):
        trained, state = step(trained, state, frozen, *texts.batch(rng, options.batch_size))
    return pj.combine(trained, frozen)


def accuracy(model: Any, texts: TextRows) -> float:
    """Share of texts whose likeliest class is theirs."""
    return float(np.mean(np.argmax(model(texts.ids, texts.mask).logits, axis=-1) == texts.labels))


def main(options: Options) -> None:
    """Pretrain if need be, then compare."""
    names, train_pairs, test_pairs = read_texts(options.classes)
    with TemporaryDirectory() as made:
        if options.model is None:
            pretrain(Path(made), train_pairs, options)
        folder = options.model or made
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        base = pj.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
    texts, test = (encode(pairs, tokenizer, options.length) for pairs in (train_pairs, test_pairs))
    print(f"{len(texts.ids)} docstrings of {', '.join(names)}; {len(test.ids)} held out")
    print(f"{'untuned':12} accuracy {accuracy(base, test):.3f}")
    for name, config in METHODS.items():
        model = pj.get_peft_model(base, config)
        model = train(model, *pj.partition(model), texts, options)
        print(f"{name:12} accuracy {accuracy(model, test):.3f}   ", end="")
        model.print_trainable_parameters()


if __name__ == "__main__":
    main(tyro.cli(Options))
