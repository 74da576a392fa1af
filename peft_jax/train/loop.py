"""The training loop: ten lines to copy out and change."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax

from peft_jax.core.partition import combine, partition
from peft_jax.train.data import Batch
from peft_jax.train.step import TrainingStep


def train(
    step: TrainingStep,
    params: Any,
    optimizer: optax.GradientTransformation,
    batches: Sequence[Batch],
    *,
    max_steps: int,
    seed: int,
) -> Iterator[tuple[int, Any, float]]:
    """Train and yield after each step.

    Args:
        step: From `make_training_step`, with the same optimizer.
        params: A tree or model handle with an adapter. Its adapter's memory is taken over, so do not use it afterwards.
        optimizer: Any optax transformation.
        batches: From `training_batches`.
        max_steps: How many steps to take.
        seed: Where dropout starts.

    Yields:
        The number of the step from 1 on, ``params`` as trained so far (usable until the next step), the batch's loss.

    Raises:
        ValueError: If the loss is not a finite number.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> from peft_jax.train import make_training_step
        >>> fn = pj.adapt(lambda params, ids, mask: jax.nn.one_hot(ids, 4) @ params["head"]["kernel"])
        >>> params = pj.apply_lora({"head": {"kernel": jnp.zeros((4, 4))}}, pj.LoraConfig(target_modules=["head"]))
        >>> optimizer = optax.adam(0.1)
        >>> step = make_training_step(fn, optimizer)
        >>> ids = jnp.array([[1, 2, 3]])
        >>> batches = [{"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}] * 20
        >>> for number, params, loss in train(step, params, optimizer, batches, max_steps=20, seed=0):
        ...     if number in (1, 20):
        ...         print(number, loss < 0.1)
        1 False
        20 True
    """
    trainable, frozen = partition(params)
    opt_state = optimizer.init(trainable)
    key = jax.random.key(seed)
    for number in range(max_steps):
        dropout_key = jax.random.fold_in(key, number)
        trainable, opt_state, loss = step(trainable, opt_state, frozen, batches[number], dropout_key)
        if not math.isfinite(float(loss)):
            raise ValueError(f"the loss is {float(loss)} at step {number + 1}. Lower the learning rate.")
        yield number + 1, combine(trainable, frozen), float(loss)
