"""Models with another number of tokens: rows of the embedding, columns and bias of the output head."""

import dataclasses
import os
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.articles import article
from peft_jax.core.handle import Handle
from peft_jax.core.pytree import PyTree
from peft_jax.core.text_files import read_object
from peft_jax.core.weight import is_weight
from peft_jax.interop.describe import read_header
from peft_jax.interop.formats import PREFIX, WEIGHTS_FILE
from peft_jax.models.config import ModelConfig
from peft_jax.models.family import LANGUAGE_MODELS, Family, leaf_at, with_leaf
from peft_jax.models.weights_io import random_leaves
from peft_jax.prompts.tokenizer import read_tokenizer

# A table of the base in an adapter's file, by what follows the module's path.
TABLES = ("weight", "base_layer.weight", "original_module.weight", "token_adapter.base_layer.weight")
LAYOUT_FILE = "training_layout.json"  # written beside an adapter by finetune
RULE = "Copy the adapter again, or remove the file and give --prompt-template."
SPREAD = 1e-9  # transformers' factor of the covariance of new rows


def tokens_of_adapter(handle: Handle, config: ModelConfig, directory: str | os.PathLike[str]) -> int:
    """How many tokens the model has that an adapter was trained on.

    The tables in the adapter's file say it, or else what finetune wrote beside it, or the tokenizer there. Never fewer
    than the model has: an adapter for fewer is that of another base.

    Args:
        handle: The base model.
        config: Its architecture.
        directory: The adapter's folder.
    """
    folder, tokens = pathlib.Path(directory), config.vocab_size
    modules = [handle.input_module]
    if config.task_type in LANGUAGE_MODELS:
        modules.append(str(handle.output_module))
    known = {f"{PREFIX}{module}.{end}" for module in modules for end in TABLES}
    rows = set()
    if (folder / WEIGHTS_FILE).is_file():
        rows = {tensor.shape[0] for key, tensor in read_header(folder / WEIGHTS_FILE).items() if key in known}
    if len(rows) == 1:
        tokens = max(tokens, rows.pop())
    recorded = None
    if (folder / LAYOUT_FILE).is_file():
        recorded = read_object(folder / LAYOUT_FILE, LAYOUT_FILE, RULE).get("tokens")
    if not rows and isinstance(recorded, int):
        return max(tokens, recorded)
    if not rows and (folder / "tokenizer_config.json").is_file():
        tokens = max(tokens, len(read_tokenizer(folder)))
    return tokens


def resized(
    family: Family, config: ModelConfig, params: PyTree, tokens: int, *, mean_resizing: bool, key: jax.Array
) -> tuple[ModelConfig, Any]:
    """Config and parameters of the same model with another number of tokens.

    Args:
        family: The architecture's functions.
        config: The architecture.
        params: The parameters.
        tokens: The number of tokens.
        mean_resizing: Whether new rows are about the mean of the old ones, or random as in a fresh model.
        key: Random key of the new rows.

    Raises:
        ValueError: if there would be no token, or a leaf with an axis of tokens is adapted or quantized.
    """
    if tokens < 1:
        raise ValueError(f"resize_token_embeddings got {tokens} tokens, and a model needs one. Give len(tokenizer).")
    new = dataclasses.replace(config, vocab_size=tokens)
    shapes, wanted = family.param_shapes(config), family.param_shapes(new)
    paths = tuple(path for path, shape in shapes.items() if wanted[path] != shape)
    fresh = {}
    if tokens > config.vocab_size and not mean_resizing and paths:
        fresh = random_leaves(new, paths, jnp.dtype(jnp.float32), key)
    for number, path in enumerate(paths):
        leaf = leaf_at(params, path)
        if is_weight(leaf):
            raise ValueError(
                f"The leaf '{path}' is {article(type(leaf).__name__)} leaf, and its tokens cannot be "
                "resized. Resize the model first, then quantize it and attach adapters."
            )
        axis = next(i for i, (old, now) in enumerate(zip(shapes[path], wanted[path], strict=True)) if old != now)
        rows = jnp.moveaxis(leaf, axis, 0)
        if tokens > len(rows):
            if path in fresh:
                more = jnp.moveaxis(fresh[path], axis, 0)[len(rows) :]
            else:
                more = about_the_mean(rows, tokens - len(rows), jax.random.fold_in(key, number))
            rows = jnp.concatenate([rows, more.astype(leaf.dtype)])
        params = with_leaf(params, path, jnp.moveaxis(rows[:tokens], 0, axis))
    return new, params


@partial(jax.jit, static_argnames="count")
def about_the_mean(rows: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """New rows, float32, drawn about the mean of the old ones with a billionth of their covariance.

    Args:
        rows: The old rows ``(tokens, features)``, or numbers ``(tokens,)``.
        count: How many there are to be.
        key: Random key.

    Example:
        >>> row = about_the_mean(jnp.array([[0.0, 2.0], [2.0, 4.0]]), 1, jax.random.key(0))
        >>> [round(number, 3) for number in row[0].tolist()]
        [1.0, 3.0]
    """
    table = rows.reshape(len(rows), -1).astype(jnp.float32)
    mean = jnp.mean(table, axis=0, keepdims=True)
    # Sums of the centred rows with normal weights have their covariance.
    weights = jax.random.normal(key, (count, len(rows))) * jnp.sqrt(SPREAD / len(rows))
    new = mean + weights @ (table - mean)
    return new.reshape(count, *rows.shape[1:])
