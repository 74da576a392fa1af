"""Training hooks: what a method does in a step of training beside following the gradient."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
from jaxtyping import Array, Float

from peft_jax.core.adapted import Adapted
from peft_jax.methods.base import Arrays

Leaves = Mapping[str, Adapted]  # adapted leaves by path
Trained = dict[str, dict[str, jax.Array]]  # the arrays that they train, by path and role


class TrainingHooks:
    """The part of a method in training, beside its gradients: a projection, or a penalty and a schedule.

    A method that has one inherits this class and overrides what it needs; `peft_jax.train` calls it. What a schedule
    remembers is a pytree beside the optimizer's state, so that checkpoints hold it.
    """

    penalizes: ClassVar[bool] = False  # whether it has a penalty
    scheduled: ClassVar[bool] = False  # whether it has a schedule: `begin`, `advance` and `finish`

    def for_run(self, max_steps: int) -> Self:
        """The config with the length of the run, where it needs that and has none."""
        return self

    def project(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The trained arrays of one leaf, stacked axes first, put back to where they may be as a step begins."""
        return params

    def penalty(self, leaves: Leaves) -> Float[Array, ""]:
        """The penalty that is added to the loss of every step, float32.

        The leaves are those of the step, with dropout switched on by the key of its first micro batch.
        """
        raise NotImplementedError

    def begin(self, leaves: Leaves) -> Any:
        """The schedule's state before the first step.

        Raises:
            ValueError: if the config does not say how to train.
        """
        raise NotImplementedError

    def advance(self, params: Trained, gradients: Trained, schedule: Any) -> tuple[Trained, Any]:
        """The arrays and the schedule's state after one more step.

        Args:
            params: The arrays as the optimizer left them.
            gradients: Those that the optimizer was given, before clipping.
            schedule: The schedule's state.
        """
        raise NotImplementedError

    def finish(self, leaves: Leaves, schedule: Any) -> tuple[Self, Leaves]:
        """The config and the leaves as they are to be saved at this point of the schedule; they compute the same."""
        raise NotImplementedError
