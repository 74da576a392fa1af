"""Methods that do more in a training step than follow the gradient: they have a penalty and a schedule."""

from collections.abc import Mapping
from typing import Any, Self

import jax

from peft_jax.core.adapted import Adapted, adapted_leaves
from peft_jax.core.handle import Handle
from peft_jax.methods.base import Method

Leaves = Mapping[str, Adapted]  # adapted leaves by path
Trained = dict[str, dict[str, jax.Array]]  # the arrays that they train, by path and role


class Scheduled(Method):
    """A method that adds a penalty to the loss, and changes its arrays after the optimizer did.

    `peft_jax.train.start` begins its schedule, the training step runs it, and `peft_jax.train.finished` ends it. What
    the schedule remembers is a pytree beside the optimizer's state, so that checkpoints hold it.
    """

    def for_run(self, max_steps: int) -> Self:
        """The config with what a run's length says."""
        return self

    def penalty(self, leaves: Leaves) -> jax.Array:
        """The penalty that is added to the loss of every step, float32."""
        raise NotImplementedError

    def begin_schedule(self, leaves: Leaves) -> Any:
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

    def end_schedule(self, tree: Any, schedule: Any) -> Any:
        """The whole tree as it is to be saved at this point of the schedule; it computes the same."""
        raise NotImplementedError


def scheduled_leaves(params: Any) -> tuple[Scheduled, dict[str, Adapted]] | None:
    """The scheduled method that a tree, a model handle or one of their twins trains, and its leaves; None without.

    Raises:
        ValueError: if there are two, which would not know of each other.
    """
    tree = params.params if isinstance(params, Handle) else params
    found: dict[str, dict[str, Adapted]] = {}
    for path, leaf in adapted_leaves(tree):
        if isinstance(leaf.method, Scheduled) and leaf.active and leaf.trainable:
            found.setdefault(leaf.tag.name, {})[path] = leaf
    if len(found) > 1:
        raise ValueError(
            f"Adapters {sorted(found)} are trained by a schedule each. Train one at a time: "
            "pj.set_adapter(params, NAME)."
        )
    if not found:
        return None
    (leaves,) = found.values()
    config: Scheduled = next(iter(leaves.values())).tag.config
    return config, leaves
