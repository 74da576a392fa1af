"""Hand the task of each row of a batch to adapters that depend on it, as POLY's do."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.ids import is_outside
from peft_jax.core.pytree import PyTree
from peft_jax.methods.tasks import TASKS, HasTasks

T = TypeVar("T")
TaskIds = int | Int[Array, "*batch"] | Int[np.ndarray, "*batch"]


def with_task_ids(params: T, task_ids: TaskIds) -> T:
    """The tree, or handle, whose adapters that depend on the task have that of each row of a batch.

    A `peft_jax.PeftModel` does it by itself, with the ``task_ids`` of its calls. With one number all rows are of that
    task: then the change of a weight is one matrix, and it merges.

    Args:
        params: Any tree or model handle.
        task_ids: The task of each row ``(batch,)``, or of all rows.

    Raises:
        ValueError: if no active adapter depends on the task, or there is no such task.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.PolyConfig(r=2, n_tasks=3, target_modules=["q"], init_weights=False)
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.zeros((4, 4))}}, config)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> x = jnp.ones((2, 5, 4))
        >>> f(pj.with_task_ids(params, jnp.array([2, 0])), x).shape
        (2, 5, 4)
        >>> pj.merge(pj.with_task_ids(params, 2))["q"]["kernel"].shape
        (4, 4)
    """
    if not methods_with_tasks(params):
        raise ValueError("task_ids are for POLY, and no such adapter is active. Leave them out.")
    check_tasks(params, task_ids)
    return handed_over(params, task_ids)


def handed_over(params: T, task_ids: TaskIds) -> T:
    """`with_task_ids` for adapters that are not active too, and without a check of the numbers."""
    ids = jnp.asarray(task_ids)
    if ids.ndim > 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"task_ids are whole numbers (batch,), got {ids.dtype} of shape {ids.shape}.")

    def hand_over(_: str, leaf: Adapted) -> Adapted:
        if not isinstance(leaf.method, HasTasks):
            return leaf
        stack = leaf.layout.stack_shape(leaf.shape)
        tasks = jnp.broadcast_to(ids, (*stack, *ids.shape))
        return dataclasses.replace(leaf, state={**leaf.state, TASKS: tasks})

    changed: T = map_adapted(hand_over, params)
    return changed


def check_tasks(params: PyTree, task_ids: Any) -> None:
    """Raise ValueError if a value of ``task_ids`` is no task of the adapters of a tree or handle."""
    for tasks in {method.n_tasks for method in methods_with_tasks(params)}:
        _check(task_ids, tasks)


def check_tasks_of_rows(params: PyTree, names: Sequence[str], task_ids: TaskIds) -> None:
    """Raise ValueError if a row's task is none of its own adapter's, or no row has an adapter with tasks.

    Args:
        params: The tree.
        names: The adapter of each row.
        task_ids: The task of each row, or of all rows.
    """
    tasks: dict[str, int] = {}
    for _, leaf in adapted_leaves(params):
        if isinstance(leaf.method, HasTasks) and leaf.tag.name in names:
            tasks[leaf.tag.name] = leaf.method.n_tasks
    if not tasks:
        raise ValueError("task_ids are for POLY, and no row has such an adapter. Leave them out.")
    ids = jnp.broadcast_to(jnp.asarray(task_ids), (len(names),))
    for name, count in tasks.items():
        _check(ids[np.array(names) == name], count)


def _check(task_ids: Any, tasks: int) -> None:
    if found := is_outside(task_ids, tasks):
        said = f"from {found[0]} to {found[1]}"
        raise ValueError(f"task_ids are {said}, but the adapter has the tasks 0 to {tasks - 1}. Name these.")


def methods_with_tasks(params: PyTree) -> list[HasTasks]:
    """The configs of active adapters that depend on the task, one for each adapted leaf."""
    leaves = [leaf for _, leaf in adapted_leaves(params) if leaf.active]
    return [leaf.method for leaf in leaves if isinstance(leaf.method, HasTasks)]
