"""Tell a frozen T5 which task to do by a soft prompt instead of by words.

    python examples/prompt_tune_t5.py

Without `--model` it first pretrains a small T5 to answer questions about the function signatures of Python's standard
library ("parameters: f(a, b=1)"), as there is nothing to download: a minute or two on two CPU cores. Then it takes the
question away. The frozen model does not know what is wanted; prompt tuning (Lester et al., 2021) trains twenty
embeddings in front of the signature until it does. Loss and exact answers are on functions of names that training never
saw. `--model` takes any T5.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cpython_text
import jax
import numpy as np
import optax
import tyro
from text_rows import TextRows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import peft_jax as pj
from peft_jax.models import T5Config

QUESTIONS: dict[str, Callable[[cpython_text.Function], str]] = {
    "parameters": lambda function: ", ".join(function.parameters),
    "name": lambda function: function.name,
    "first": lambda function: function.parameters[0],
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train, and for how long.

    Attributes:
        model: Folder (or hub id) of a T5; a small one is pretrained if none is given.
        question: The question whose place the prompt takes, one of QUESTIONS.
        longest: Characters of the longest signature that is used.
        pretraining_steps: Steps of the pretraining.
        steps: Steps of the prompt.
        batch_size: Examples in a step.
        learning_rate: Peak of the prompt's learning rate.
    """

    model: str | None = None
    question: str = "parameters"
    longest: int = 32
    pretraining_steps: int = 1500
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 0.3


def signatures(longest: int) -> tuple[list[cpython_text.Function], list[cpython_text.Function]]:
    """Functions with parameters, each signature once: to train on, and held out."""
    once = {f.signature: f for f in cpython_text.functions() if f.parameters and len(f.signature) <= longest}
    parts: tuple[list[cpython_text.Function], ...] = ([], [])
    for function in once.values():
        parts[cpython_text.is_held_out(function.name)].append(function)
    return parts[0], parts[1]


def encode(pairs: list[tuple[str, str]], tokenizer: Any) -> TextRows:
    """Token ids of inputs and outputs, padded on the right to the longest."""
    inputs = tokenizer([text for text, _ in pairs], padding=True, return_tensors="np")
    outputs = tokenizer([answer for _, answer in pairs], padding=True, return_tensors="np")
    labels = np.where(outputs["attention_mask"] == 1, outputs["input_ids"], -100)
    return TextRows(inputs["input_ids"], inputs["attention_mask"], labels)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that ends each text with `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def fit(
    trained: Any, frozen: Any, optimizer: optax.GradientTransformation, pairs: TextRows, steps: int, size: int
) -> Any:
    """The model after training its first partition and keeping the other."""

    def loss_fn(trained: Any, frozen: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        return pj.combine(trained, frozen)(ids, mask, labels=labels).loss

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any, frozen: Any, *batch: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(trained, frozen, *batch)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, rng = optimizer.init(trained), np.random.default_rng(0)
    for number in range(steps):
        trained, state, loss = step(trained, state, frozen, *pairs.batch(rng, size))
        if number in (0, steps - 1) or number % 250 == 249:
            print(f"  step {number + 1}: loss {loss:.3f}", flush=True)
    return pj.combine(trained, frozen)


def pretrain(folder: Path, pairs: list[tuple[str, str]], options: Options) -> None:
    """Write a T5 that has learned to do what its input says."""
    tokenizer = make_tokenizer([f"{text} {answer}" for text, answer in pairs])
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        head_dim=24,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        feed_forward_proj="gated-gelu",
    )
    model = pj.AutoModelForSeq2SeqLM.from_config(config)
    warmup = min(100, options.pretraining_steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, options.pretraining_steps)
    nothing = jax.tree.map(lambda _: None, model)  # frozen
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    steps, size = options.pretraining_steps, options.batch_size
    fit(model, nothing, optimizer, encode(pairs, tokenizer), steps, size).save_pretrained(folder)


def report(name: str, model: Any, pairs: list[tuple[str, str]], tokenizer: Any) -> None:
    """Print loss and exact answers on held-out pairs."""
    test = encode(pairs, tokenizer)
    loss = float(model(test.ids, test.mask, labels=test.labels).loss)
    answers = model.generate(test.ids, test.mask, max_new_tokens=test.labels.shape[1])
    texts = tokenizer.batch_decode(np.asarray(answers).tolist(), skip_special_tokens=True)
    exact = sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True))
    print(f"{name:12} held-out loss {loss:.3f}, {exact} of {len(pairs)} answers exact, as {pairs[0][0]} -> {texts[0]}")


def main(options: Options) -> None:
    """Pretrain if need be, then tune the prompt."""
    train, test = signatures(options.longest)
    pairs = [(f"{question}: {f.signature}", answer(f)) for question, answer in QUESTIONS.items() for f in train]
    asked, held_out = ([(f.signature, QUESTIONS[options.question](f)) for f in found] for found in (train, test[:100]))
    with TemporaryDirectory() as made:
        if options.model is None:
            print("pretraining")
            pretrain(Path(made), pairs, options)
        folder = options.model or made
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        base = pj.AutoModelForSeq2SeqLM.from_pretrained(folder)
    report("untuned", base, held_out, tokenizer)

    config = pj.PromptTuningConfig(num_virtual_tokens=20, task_type="SEQ_2_SEQ_LM")
    model = pj.get_peft_model(base, config)
    model.print_trainable_parameters()
    optimizer = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps), weight_decay=0.0)
    model = fit(*pj.partition(model), optimizer, encode(asked, tokenizer), options.steps, options.batch_size)
    report("prompt tuned", model, held_out, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Options))
