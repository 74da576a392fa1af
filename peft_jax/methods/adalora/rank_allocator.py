"""AdaLoRA's budget: how many singular values may stay at each step, and which ones, as pure functions.

Zhang et al., 2023, https://openreview.net/forum?id=lq62uWRJjiY: equations 8 to 12 and algorithm 1. Numbers follow the
``RankAllocator`` of PEFT 0.21.2, except that a budget of all ranks masks none, where PEFT fails.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NONE_DUE = -1
Arrays = Mapping[str, Mapping[str, jax.Array]]  # by leaf and role


class Allocation(NamedTuple):
    """The allocator's state.

    Attributes:
        step: Steps done, int32.
        budgets: How many singular values may stay after each step, up to the last that chooses, ``(steps + 1,)``
            int32; `NONE_DUE` where none is masked.
        importance: Smoothed sensitivity of each element, by leaf and role, shaped as the arrays.
        uncertainty: Smoothed distance of the sensitivity from it, likewise.
        there: Which singular values are not padding, by leaf, ``(*stack, rank)``.
        kept: Which of them the last choice kept.
    """

    step: jax.Array
    budgets: jax.Array
    importance: Any
    uncertainty: Any
    there: dict[str, jax.Array]
    kept: dict[str, jax.Array]


def budget(step: int, initial: int, target: int, *, tinit: int, tfinal: int, total_step: int) -> int:
    """Number of singular values that may stay after a step: all at first, then falling as a cube to the target.

    Example:
        >>> [budget(step, 12, 4, tinit=1, tfinal=2, total_step=8) for step in range(8)]
        [12, 12, 8, 5, 4, 4, 4, 4]
    """
    if step <= tinit:
        return initial
    if step > total_step - tfinal:
        return target
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int((initial - target) * left**3 + target)


def begin(params: Arrays, there: Mapping[str, np.ndarray], target_r: int, delta: int, **times: int) -> Allocation:
    """The state before the first step.

    Args:
        params: ``lora_A``, ``lora_E`` and ``lora_B`` by leaf.
        there: Which singular values are not padding, by leaf.
        target_r: How many may stay in the end, for each layer on average.
        delta: Steps between two choices.
        **times: ``tinit``, ``tfinal`` and ``total_step``, as `budget` takes them.
    """
    layers = sum(int(np.any(mask, axis=-1).sum()) for mask in there.values())
    initial, last = sum(int(mask.sum()) for mask in there.values()), times["total_step"] - times["tfinal"]
    target = min(target_r * layers, initial)
    due = [step == last or (step > times["tinit"] and step % delta == 0) for step in range(last + 1)]
    table = [budget(step, initial, target, **times) if on else NONE_DUE for step, on in enumerate(due)]
    zeros, masks = [], []
    for _ in range(2):  # arrays of their own, for a step takes over each of them
        zeros.append(jax.tree.map(jnp.zeros_like, {path: dict(roles) for path, roles in params.items()}))
        masks.append(jax.tree.map(jnp.array, dict(there)))
    return Allocation(jnp.zeros((), jnp.int32), jnp.array(table, jnp.int32), *zeros, *masks)


def allocate(
    params: Arrays, gradients: Arrays, allocation: Allocation, *, beta1: float, beta2: float
) -> tuple[dict[str, dict[str, jax.Array]], Allocation]:
    """One more step: measure, and where it is due set the least important singular values to zero.

    Those that are not kept may grow again until the next choice; after the last one they stay zero.

    Args:
        params: As the optimizer left them.
        gradients: Those that the optimizer was given.
        allocation: The state.
        beta1: Smoothing of the sensitivity.
        beta2: Smoothing of the uncertainty.

    Returns:
        The arrays, and the state.
    """
    step, last = allocation.step + 1, len(allocation.budgets) - 1

    def measure(array: jax.Array, gradient: jax.Array, mean: jax.Array, spread: jax.Array) -> tuple[jax.Array, ...]:
        sensitivity = jnp.abs(array * gradient)
        new_mean = beta1 * mean + (1 - beta1) * sensitivity
        new_spread = beta2 * spread + (1 - beta2) * jnp.abs(sensitivity - new_mean)
        return jnp.where(step < last, new_mean, mean), jnp.where(step < last, new_spread, spread)

    importance: dict[str, dict[str, jax.Array]] = {}
    uncertainty: dict[str, dict[str, jax.Array]] = {}
    for path, roles in params.items():
        means, spreads = dict[str, jax.Array](), dict[str, jax.Array]()
        for role, array in roles.items():
            before = allocation.importance[path][role], allocation.uncertainty[path][role]
            means[role], spreads[role] = measure(array, gradients[path][role], *before)
        importance[path], uncertainty[path] = means, spreads

    left = allocation.budgets[jnp.minimum(step, last)]
    is_due = (step <= last) & (left != NONE_DUE)
    scores = {path: _scores(importance[path], uncertainty[path]) for path in params}
    threshold = _threshold(scores, allocation.there, left)
    kept, found = {}, {}
    for path, roles in params.items():
        chosen = allocation.there[path] & (scores[path] > threshold)
        kept[path] = jnp.where(is_due, chosen, allocation.kept[path])
        masked = jnp.where(kept[path], roles["lora_E"], 0)
        found[path] = {**roles, "lora_E": jnp.where(is_due | (step > last), masked, roles["lora_E"])}
    return found, allocation._replace(step=step, importance=importance, uncertainty=uncertainty, kept=kept)


def _scores(importance: Mapping[str, jax.Array], uncertainty: Mapping[str, jax.Array]) -> jax.Array:
    """Of each singular value with its two vectors, ``(*stack, rank)``."""
    a, e, b = (importance[role] * uncertainty[role] for role in ("lora_A", "lora_E", "lora_B"))
    return e + (jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1))


def _threshold(scores: Mapping[str, jax.Array], there: Mapping[str, jax.Array], left: jax.Array) -> jax.Array:
    """The highest score that is masked, over all leaves, so that ``left`` stay; minus infinity if all do."""
    flat = jnp.concatenate([jnp.where(there[path], scores[path], jnp.inf).ravel() for path in scores])
    dropped = sum(jnp.sum(mask, dtype=jnp.int32) for mask in there.values()) - left
    return jnp.where(dropped > 0, jnp.sort(flat)[jnp.maximum(dropped - 1, 0)], -jnp.inf)


def needed(params: Mapping[str, jax.Array], path: str, allocation: Allocation) -> np.ndarray:
    """Which singular values a leaf's file needs: those that were kept, and those that have grown again since then."""
    there, kept = np.asarray(allocation.there[path]), np.asarray(allocation.kept[path])
    return np.asarray(there & (kept | (np.asarray(params["lora_E"]) != 0)))


def narrowed(pattern: list[bool], kept: np.ndarray) -> list[bool]:
    """A pattern of ``init_r`` entries, of whose true ones only the kept stay true."""
    left = iter(kept.tolist())
    return [bool(on and next(left)) for on in pattern]


def compacted(params: Mapping[str, jax.Array], kept: np.ndarray) -> dict[str, jax.Array]:
    """The arrays with the kept ranks in front, as narrow as the layer with most of them allows."""
    width = int(kept.sum(-1).max())
    order = np.argsort(~kept, axis=-1, kind="stable")[..., :width]
    is_kept = np.take_along_axis(kept, order, -1)

    def take(array: jax.Array, axis: int) -> jax.Array:
        index, mask = (np.expand_dims(x, -3 - axis) if array.ndim > kept.ndim else x for x in (order, is_kept))
        return jnp.where(mask, jnp.take_along_axis(array, jnp.asarray(index), axis), 0)

    return {
        "lora_A": take(params["lora_A"], -1),
        "lora_E": take(params["lora_E"], -1),
        "lora_B": take(params["lora_B"], -2),
    }
