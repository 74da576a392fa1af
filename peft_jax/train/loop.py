"""The training loop: ten lines to copy out and change."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from peft_jax.core.partition import partition
from peft_jax.core.pytree import PyTree
from peft_jax.train.divergence import Diverged, check_finite
from peft_jax.train.hooks import init_optimizer
from peft_jax.train.step import StepMetrics, TrainingStep

B = TypeVar("B")


class State(NamedTuple):
    """The state of a run: all that it needs to go on, beside the frozen partition and the data.

    Attributes:
        step: The number of steps done, which is also the position in the data.
        trainable: The trainable partition.
        opt_state: The optimizer's state, and that of the method's schedule, if it has one.
        key: The run's random key; each step folds its number in.
    """

    step: int
    trainable: PyTree
    opt_state: PyTree
    key: jax.Array


def start(params: PyTree, optimizer: optax.GradientTransformation, *, seed: int) -> tuple[State, Any]:
    """Split a tree or model handle with an adapter into the state of a run at step 0 and the frozen partition."""
    trainable, frozen = partition(params)
    return State(0, trainable, init_optimizer(optimizer, params), jax.random.key(seed)), frozen


def train(
    step: TrainingStep[B],
    state: State,
    frozen: PyTree,
    batches: Sequence[B],
    *,
    max_steps: int,
) -> Iterator[tuple[State, StepMetrics]]:
    """Train, and yield after each step.

    Args:
        step: From `make_training_step`, or for batches in micro batches from `make_accumulating_step`.
        state: From `start`, or an earlier state of this run. Its memory is taken over, so do not use it afterwards.
        frozen: The frozen partition; ``peft_jax.combine(state.trainable, frozen)`` is the model, and
            ``peft_jax.train.finished(state.trainable, frozen, state.opt_state)`` the one to save.
        batches: From `training_batches`; item ``n`` is that of step ``n``.
        max_steps: The step at which to end.

    Yields:
        The state (usable until the next step), and the step's metrics.

    Raises:
        Diverged: A ValueError, if the loss, the gradient's norm, a parameter or the optimizer's state is not finite
            after a step; its ``state`` is that before the step.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> from peft_jax.train import make_training_step
        >>> fn = pj.adapt(lambda params, ids, mask: jax.nn.one_hot(ids, 4) @ params["head"]["kernel"])
        >>> params = pj.apply_lora({"head": {"kernel": jnp.zeros((4, 4))}}, pj.LoraConfig(target_modules=["head"]))
        >>> optimizer = optax.adam(0.1)
        >>> step = make_training_step(fn, optimizer)
        >>> ids = jnp.array([[1, 2, 3]])
        >>> batches = [{"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}] * 20
        >>> state, frozen = start(params, optimizer, seed=0)
        >>> for state, metrics in train(step, state, frozen, batches, max_steps=20):
        ...     if state.step in (1, 20):
        ...         print(state.step, bool(metrics.loss < 0.1))
        1 False
        20 True
    """
    while state.step < max_steps:
        key = jax.random.fold_in(state.key, state.step)
        trainable, opt_state, metrics = step(state.trainable, state.opt_state, frozen, batches[state.step], key)
        try:
            check_finite(metrics, state.step + 1, trainable, opt_state)
        except Diverged as error:
            error.state = State(state.step, trainable, opt_state, state.key)
            raise
        state = State(state.step + 1, trainable, opt_state, state.key)
        yield state, metrics
