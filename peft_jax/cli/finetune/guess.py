"""The programs that a run most likely needs are known from a sample of its data, before all of them are tokenized."""

import contextlib
import dataclasses
import heapq
import io
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from peft_jax.cli.finetune.setup import Examples
from peft_jax.cli.finetune.steps import Plan
from peft_jax.cli.shared.data_sources import Loaded
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import picked
from peft_jax.train import Batch, State

ENOUGH = 8192  # records whose tokenizing takes longer than to tokenize a sample and to plan for it
CORES = 4  # of two, tokenizing and compiling each keep more than one busy, and a guess neither costs nor saves time
SAMPLE = 512  # records, of all of them
LONGEST = 4  # records of the sample that are the longest ones: rows are as wide as the longest needs
LOOKED_AT = 20000  # records among which the longest are looked for
BATCHES = 8  # batches of the sample whose micro batches are looked at

Planned = tuple[Plan, State, PyTree]  # a run's plan, and the outlines of its state and its frozen partition


class Guess(NamedTuple):
    """A run as it would be if its data were a sample of them.

    Attributes:
        plan: Its plan.
        programs: Those of the plan's micro batches, that of the commonest shape first; each is lowered when it is asked
            for.
    """

    plan: Plan
    programs: Iterator[jax.stages.Lowered]


def is_worthwhile(loaded: object) -> bool:
    """Whether the data take long, and there are cores for both."""
    is_large = isinstance(loaded, Loaded) and len(loaded.records) >= ENOUGH
    return is_large and (os.cpu_count() or 1) >= CORES


def sample_of(loaded: Loaded) -> Loaded:
    """Take records at even distances, and the longest ones.

    Example:
        >>> len(sample_of(Loaded([""] * 9000, (9000,), None, ())).records)
        512
    """
    records = loaded.records
    looked_at = range(0, len(records), max(1, len(records) // LOOKED_AT))
    longest = heapq.nlargest(LONGEST, looked_at, key=lambda place: len(repr(records[place])))
    spread = np.linspace(0, len(records) - 1, SAMPLE - LONGEST).astype(int).tolist()
    chosen = picked(records, sorted(spread + longest))
    return dataclasses.replace(loaded, records=list(chosen), counts=(len(chosen),), weights=None)


def guessed(
    make_data: Callable[[Loaded], Examples], make_plan: Callable[[Examples], Planned | None], loaded: Loaded
) -> Guess | None:
    """Plan the run as if its data were a sample, and give the programs of that plan's micro batches.

    Args:
        make_data: Makes a run's examples of its records.
        make_plan: Makes a run's plan for an outline of its model; None where there is no outline.
        loaded: All records.

    Returns:
        The guess. None if the sample cannot be planned for: what is wrong with it is found again with all records, and
        reported then.
    """
    unsaid = io.StringIO()  # what is said of the sample is said of all records later
    try:
        with contextlib.redirect_stdout(unsaid), contextlib.redirect_stderr(unsaid):
            planned = make_plan(make_data(sample_of(loaded)))
            if planned is None:
                return None
            plan, state, frozen = planned
            micro_batches: list[Batch] = []
            for number in range(BATCHES):  # by number: a loop over the batches themselves would read far ahead
                micro_batches += plan.batches[number]
    except Exception:
        return None
    programs = plan.step.programs_of_micro_batches(state.trainable, frozen, micro_batches, state.key)
    return Guess(plan, programs)
