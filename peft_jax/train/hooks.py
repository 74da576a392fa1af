"""Methods that do more in a step than follow the gradient, such as AdaLoRA: penalties and schedules in a run."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.adapted import Adapted, map_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.partition import combine, partition
from peft_jax.methods.training_hooks import scheduled_leaves

T = TypeVar("T")


class ScheduledState(NamedTuple):
    """The optimizer's state, and beside it what the method's schedule remembers."""

    optimizer: Any
    schedule: Any


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The state that a training step needs beside the trainable partition: the optimizer's, and that of a schedule.

    Args:
        optimizer: The optimizer.
        params: The whole tree or model handle, not a partition of it.

    Returns:
        ``optimizer.init(trainable)``; for a method with a schedule a `ScheduledState`.

    Raises:
        ValueError: if the method's config does not say how to train.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q"])
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.ones((4, 4))}}, config)
        >>> init_optimizer(optax.sgd(0.1), params).schedule.budgets.tolist()  # two ranks at first, one in the end
        [-1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    state = optimizer.init(partition(params)[0])
    if (found := scheduled_leaves(params)) is None:
        return state
    config, leaves = found
    return ScheduledState(state, config.begin_schedule(leaves))


def penalized(loss: jax.Array, gradients: Any, trainable: Any, frozen: Any) -> tuple[jax.Array, Any]:
    """Loss and gradients with those of the method's penalty added, if it has one."""

    def penalty(trainable: Any) -> jax.Array:
        config, leaves = scheduled_leaves(combine(trainable, frozen)) or (None, {})
        assert config is not None
        return config.penalty(leaves)

    if scheduled_leaves(trainable) is None:
        return loss, gradients
    more, slope = jax.value_and_grad(penalty)(trainable)
    return loss + more, jax.tree.map(jnp.add, gradients, slope)


def split_state(trainable: Any, opt_state: Any) -> tuple[Any, Any]:
    """The optimizer's state and the schedule's, which is None for a method without one.

    Raises:
        ValueError: if there is none for a method that needs it.
    """
    if (found := scheduled_leaves(trainable)) is None:
        return opt_state, None
    if not isinstance(opt_state, ScheduledState):
        raise ValueError(
            f"{found[0].peft_type} is trained by a schedule, whose state is missing. "
            "Make the optimizer's state by peft_jax.train.init_optimizer(optimizer, params), or peft_jax.train.start."
        )
    return opt_state


def advance(trainable: T, gradients: Any, opt_state: Any, schedule: Any) -> tuple[T, Any]:
    """The trainable partition after the schedule's part of a step, and the state to go on with."""
    if schedule is None:
        return trainable, opt_state
    config, leaves = scheduled_leaves(trainable) or (None, {})
    _, slopes = scheduled_leaves(gradients) or (None, {})
    assert config is not None
    arrays = {path: leaf.params for path, leaf in leaves.items()}
    gradients_of_arrays = {path: leaf.params for path, leaf in slopes.items()}
    found, schedule = config.advance(arrays, gradients_of_arrays, schedule)
    return _with_params(trainable, found), ScheduledState(opt_state, schedule)


def finished(trainable: Any, frozen: Any, opt_state: Any) -> Any:
    """The tree or handle to save: `peft_jax.combine`, without the ranks that a schedule removed.

    Example:
        >>> import peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
        >>> trainable, frozen = pj.partition(params)
        >>> finished(trainable, frozen, optax.sgd(0.1).init(trainable))["q"]["kernel"].shape
        (4, 4)
    """
    params = combine(trainable, frozen)
    if (found := scheduled_leaves(params)) is None:
        return params
    _, schedule = split_state(trainable, opt_state)
    tree = params.params if isinstance(params, Handle) else params
    tree = found[0].end_schedule(tree, schedule)
    return params.replace(tree) if isinstance(params, Handle) else tree


def _with_params(trainable: T, arrays: Any) -> T:
    def put(path: str, leaf: Adapted) -> Adapted:
        return dataclasses.replace(leaf, params=arrays[path]) if path in arrays else leaf

    if isinstance(trainable, Handle):
        return trainable.replace(map_adapted(put, trainable.params))
    return map_adapted(put, trainable)
