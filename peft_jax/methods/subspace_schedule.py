"""The schedule of AdaMSS: training freezes the subspaces of all layers that matter least."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.methods.base import Arrays
from peft_jax.methods.singular_clusters import first_of
from peft_jax.methods.training_hooks import Leaves, Trained, TrainingHooks

A, B = "adamss_A", "adamss_B"


class Scores(NamedTuple):
    """The scores of a leaf, stacked axes first.

    Attributes:
        kept: Its arrays at the last step in which they were trained, by role.
        importance: The mean of ``|w dL/dw|`` since the last choice, by role.
        deviation: The mean of how far that was from its mean, by role.
        active: Which of its subspaces are trained.
        shares: What each element counts for in the mean of its subspace, by role; zero for padding.
        cluster: The subspace of each row of B.
    """

    kept: dict[str, jax.Array]
    importance: dict[str, jax.Array]
    deviation: dict[str, jax.Array]
    active: jax.Array
    shares: dict[str, jax.Array]
    cluster: jax.Array


class Schedule(NamedTuple):
    """The schedule of an adapter.

    Attributes:
        step: Number of steps that are done.
        targets: Number of subspaces at the choices, from the first possible one on.
        leaves: What it remembers of each leaf, by path.
    """

    step: jax.Array
    targets: jax.Array
    leaves: dict[str, Scores]


class SubspaceSchedule(TrainingHooks):
    """The part of AdaMSS in training steps: PEFT's ``update_and_allocate``."""

    # Fields of the config.
    use_asa: bool
    asa_target_subspaces: int
    init_warmup: int
    final_warmup: int
    mask_interval: int
    asa_importance_beta: float
    asa_uncertainty_beta: float
    asa_schedule_exponent: float

    @property
    def scheduled(self) -> bool:  # type: ignore[override]  # of a config, not of the class
        """``use_asa``."""
        return self.use_asa

    def check_schedule(self) -> None:
        """Raise ValueError if a field has a value that is wrong."""
        if not self.use_asa:
            return
        for field in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            if (value := getattr(self, field)) <= 0:
                raise ValueError(f"{field} is a number above 0 with use_asa, got {value}.")
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"init_warmup={self.init_warmup} is to be below final_warmup={self.final_warmup} with use_asa."
            )

    def begin(self, leaves: Leaves) -> Schedule:
        """All subspaces are trained, and nothing is known of them."""
        found, total = {}, 0
        for path, leaf in leaves.items():
            total += int(np.sum(np.asarray(leaf.state["adamss_lengths"]) > 0))
            found[path] = _fresh(leaf.params, leaf.state)
        return Schedule(jnp.zeros((), jnp.int32), jnp.asarray(self._targets(total), jnp.int32), found)

    def _targets(self, total: int) -> list[int]:
        """The number of subspaces at each step that is a multiple of the interval, up to ``final_warmup``."""
        found = []
        for step in range(0, self.final_warmup + 1, self.mask_interval):
            left = 1.0 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
            share = max(0.0, min(1.0, left)) ** self.asa_schedule_exponent
            found.append(int(self.asa_target_subspaces + (total - self.asa_target_subspaces) * share))
        return found

    def advance(self, params: Trained, gradients: Trained, schedule: Schedule) -> tuple[Trained, Schedule]:
        """The arrays with those of frozen subspaces as they were, and the subspaces that go on being trained."""
        step = schedule.step
        counts = (step >= self.init_warmup) & (step <= self.final_warmup)
        chooses = counts & (step % self.mask_interval == 0)
        leaves, arrays = {}, {}
        for path, scores in schedule.leaves.items():
            arrays[path] = {role: _chosen(scores, role, params[path][role], scores.kept[role]) for role in (A, B)}
            leaves[path] = self._updated(scores, arrays[path], gradients[path], counts)
        target = schedule.targets[jnp.minimum(step // self.mask_interval, len(schedule.targets) - 1)]
        active = _best(leaves, target)
        for path, scores in leaves.items():
            is_on = jnp.where(chooses, active[path], scores.active)
            zero = {role: jnp.where(chooses, 0, array) for role, array in scores.importance.items()}
            zero_too = {role: jnp.where(chooses, 0, array) for role, array in scores.deviation.items()}
            leaves[path] = scores._replace(active=is_on, importance=zero, deviation=zero_too)
        return arrays, Schedule(step + 1, schedule.targets, leaves)

    def _updated(self, scores: Scores, arrays: Any, gradients: Any, counts: jax.Array) -> Scores:
        """The means after one more step, if that counts."""
        means, deviations = {}, {}
        for role in (A, B):
            now = jnp.abs(arrays[role] * gradients[role])
            before, spread = scores.importance[role], scores.deviation[role]
            beta, gamma = self.asa_importance_beta, self.asa_uncertainty_beta
            means[role] = jnp.where(counts, beta * before + (1 - beta) * now, before)
            deviations[role] = jnp.where(counts, gamma * spread + (1 - gamma) * jnp.abs(now - before), spread)
        return scores._replace(kept=arrays, importance=means, deviation=deviations)

    def finish(self, leaves: Leaves, schedule: Schedule) -> tuple[Self, Leaves]:
        """As they are."""
        return self, leaves


def _fresh(params: Arrays, state: Mapping[str, Any]) -> Scores:
    """The scores of a leaf before the first step."""
    ranks, lengths, cluster = state["adamss_ranks"], state["adamss_lengths"], state["cluster"]
    width = jnp.sum(jnp.any(state["adamss_newB"] != 0, axis=-1), axis=-1)
    of_rows, sizes = (jnp.take_along_axis(array, cluster, -1) for array in (ranks, ranks * lengths))
    rows = _shares(first_of(params[A].shape[-2], ranks), ranks * width[..., None])
    shares = {
        A: jnp.broadcast_to(rows[..., None], params[A].shape),
        B: _shares(first_of(params[B].shape[-1], of_rows), sizes),
    }
    # A step donates what the leaf has, and each array once.
    kept = {role: jnp.copy(array) for role, array in params.items()}
    # A step donates each array once, so the means are not the deviations.
    means, deviations = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
    return Scores(kept, means, deviations, lengths > 0, shares, jnp.copy(cluster))


def _shares(counted: jax.Array, sizes: jax.Array) -> jax.Array:
    """One over the size of its group for each element that counts, zero for others."""
    return jnp.where(counted, 1 / jnp.maximum(sizes, 1).astype(jnp.float32)[..., None], 0)


def _chosen(scores: Scores, role: str, trained: jax.Array, kept: jax.Array) -> jax.Array:
    """An array as it was trained, and as it was before in frozen subspaces."""
    if role == A:
        return jnp.where(scores.active[..., None, None], trained, kept)
    return jnp.where(jnp.take_along_axis(scores.active, scores.cluster, -1)[..., None], trained, kept)


def _best(leaves: dict[str, Scores], target: jax.Array) -> dict[str, jax.Array]:
    """Which subspaces have a score above that of rank ``target`` among all that are still trained."""
    found = {}
    for path, scores in leaves.items():
        product = {role: scores.importance[role] * scores.deviation[role] * scores.shares[role] for role in (A, B)}
        subspaces = scores.active.shape[-1]
        is_own = jax.nn.one_hot(scores.cluster, subspaces, dtype=product[B].dtype)
        of_rows = jnp.einsum("...or,...ok->...k", product[B], is_own)
        found[path] = jnp.where(scores.active, jnp.sum(product[A], axis=(-2, -1)) + of_rows, -jnp.inf)
    every = -jnp.sort(-jnp.concatenate([scores.reshape(-1) for scores in found.values()]))
    count = sum(jnp.sum(scores.active) for scores in leaves.values())
    least = jnp.where(target >= count, -jnp.inf, every[jnp.maximum(target, 1) - 1])
    return {path: scores > least for path, scores in found.items()}
