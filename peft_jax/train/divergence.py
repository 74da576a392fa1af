"""Steps that give NaN or infinities: found inside the compiled step, which then keeps the state as it was."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from peft_jax.core.finite import all_finite
from peft_jax.core.paths import dotted
from peft_jax.core.pytree import PyTree

if TYPE_CHECKING:
    from peft_jax.train.loop import State
    from peft_jax.train.step import StepMetrics

NONE, LOSS, GRADIENT, ARRAYS = 0, 1, 2, 3  # faults; from ARRAYS on they count the arrays of the state
ADVICE = "Lower the learning rate, or clip gradients to a smaller max_grad_norm"


class Diverged(ValueError):
    """A training step gave values that are not finite.

    Attributes:
        found: Which step, and what was not finite.
        state: The last good state, where `peft_jax.train.train` raises it.
    """

    def __init__(self, found: str, advice: str = ADVICE, state: "State | None" = None) -> None:
        super().__init__(f"{found}. {advice}.")
        self.found, self.state = found, state


def finite_or_old(
    update: Callable[[tuple[Any, Any], Any], tuple[Any, Any]],
    old: tuple[Any, Any],
    gradients: Any,
    loss: jax.Array,
    grad_norm: jax.Array,
) -> tuple[tuple[Any, Any], jax.Array]:
    """Trainable partition and optimizer state after a step, or those before it where something is not finite.

    The update is computed twice: for what is looked at, and for what is kept. A new state that waits for the answer
    would be a second one in memory beside the old; computed again, it is written over the old one.

    Args:
        update: ``(old, gradients)`` to the trainable partition and the optimizer state after the step.
        old: The same before it.
        gradients: Those of the step.
        loss: The step's loss.
        grad_norm: Norm of its gradient.

    Returns:
        The state, and the number of the first fault, 0 for none. An infinity that the optimizer's state had before is
        no fault, as some optimizers start with one.
    """
    new = update(old, gradients)
    faults = [~jnp.isfinite(loss), ~jnp.isfinite(grad_norm)]
    for array in jax.tree.leaves(new[0]):
        faults.append(~all_finite(array) if _is_float(array) else jnp.array(False))
    for array, before in zip(jax.tree.leaves(new[1]), jax.tree.leaves(old[1]), strict=True):
        broken = ~jnp.isfinite(array) & jnp.isfinite(before) if _is_float(array) else jnp.array(False)
        faults.append(jnp.any(broken))
    is_fault = jnp.stack(faults)
    is_good = ~jnp.any(is_fault)
    # The barrier keeps compilers from taking the first result for the second one.
    is_good, old, gradients = jax.lax.optimization_barrier((is_good, old, gradients))
    new = update(old, gradients)
    kept = jax.tree.map(lambda array, before: jax.lax.select(is_good, array, before.astype(array.dtype)), new, old)
    return kept, jnp.where(is_good, NONE, jnp.argmax(is_fault) + LOSS).astype(jnp.int32)


def check_finite(metrics: "StepMetrics", step: int, trainable: PyTree, opt_state: PyTree) -> None:
    """Stop a loop whose last step gave values that are not finite; its state is as it was before that step.

    Args:
        metrics: What the step reports.
        step: Its number, from 1 on.
        trainable: The trainable partition that the step gave.
        opt_state: The optimizer's state that it gave.

    Raises:
        Diverged: a ValueError that says which step, and what was not finite.

    Example:
        >>> from peft_jax.train import StepMetrics, check_finite
        >>> metrics = StepMetrics(jnp.float32(2.5), jnp.float32(1.0), jnp.int32(8), jnp.int32(0), jnp.int32(8))
        >>> check_finite(metrics, 1, {}, ())
    """
    fault = int(metrics.fault)
    if fault == LOSS:
        raise Diverged(f"the loss is {float(metrics.loss)} at step {step}", f"{ADVICE}; ids out of range give NaN too")
    if fault == GRADIENT:
        raise Diverged(f"the gradient norm is {float(metrics.grad_norm)} at step {step}")
    if fault != NONE:
        paths = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path((trainable, opt_state))]
        which, _, path = paths[fault - ARRAYS].partition(".")
        what = "parameters" if which == "0" else "optimizer state"
        raise Diverged(f"the update of the {what} '{path}' is not finite at step {step}")


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)
