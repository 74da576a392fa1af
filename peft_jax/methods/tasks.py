"""Base class of methods whose change of a weight depends on the task of each row of a batch."""

from collections.abc import Mapping
from typing import Any

import jax

TASKS = "tasks"  # in the state of a leaf: the task of all rows, or that of each row


class HasTasks:
    """A method that has several tasks, of which each row of a batch names one.

    `peft_jax.with_task_ids` puts them into the state of its leaves, stacked axes first.
    """

    n_tasks: int

    @property
    def tasks(self) -> int:
        """How many tasks a row has to name one of; 0 where there is one alone."""
        return self.n_tasks if self.n_tasks > 1 else 0


def tasks_in(state: Mapping[str, Any]) -> jax.Array | None:
    """The task of all rows ``(*stack,)``, or of each row ``(*stack, batch)``; None if it was not given."""
    tasks: jax.Array | None = state.get(TASKS)
    return tasks
