"""The compiled steps and the schedule of a run of `peft-jax finetune`, on one device or on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_jax.cli.finetune.ahead import is_outline
from peft_jax.cli.finetune.options import Finetune
from peft_jax.cli.finetune.setup import Examples
from peft_jax.cli.shared.micro_rows import choose_micro_layout
from peft_jax.cli.shared.task import Evaluation, Task
from peft_jax.core.partition import combine, partition
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import field_names, fields_of
from peft_jax.models.handles.base import ModelHandle
from peft_jax.train import (
    Batch,
    State,
    StepMetrics,
    evaluation_batches,
    finished,
    make_accumulating_step,
    make_optimizer,
    make_schedule,
    start,
    steps_per_epoch,
    training_batches,
)
from peft_jax.train.accumulate import AccumulatingStep
from peft_jax.train.batch_loss import SummedLoss
from peft_jax.train.data.batches import Data
from peft_jax.train.data.micro_layout import MicroLayout
from peft_jax.train.hooks import init_optimizer, scheduled
from peft_jax.train.mesh import (
    PlacedBatches,
    batch_parts,
    place,
    place_batch,
    place_state,
    shardings,
    with_mesh_in_use,
    with_whole_adapters,
)
from peft_jax.train.optimizer import Schedule, default_warmup


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a run and their data.

    Attributes:
        task: What is trained.
        max_steps: Steps in all.
        epoch: Steps of an epoch.
        eval_steps: Steps between evaluations.
        rate: The learning rate by step.
        batches: Item ``n`` is the batch of step ``n``, in micro batches.
        validation_data: Rows kept apart, or None.
        layout: How rows are laid into micro batches.
        loss: That of the data's labels; None for cross entropy.
        step: The compiled training step.
        optimizer: The optimizer.
        seed: That of the run.
        evaluation: The evaluation of a model on batches.
        mesh: The devices that all of it is sharded over; None for one device.
    """

    task: Task
    max_steps: int
    epoch: int
    eval_steps: int
    rate: Schedule
    batches: Sequence[Sequence[Batch]]
    validation_data: Data | None
    layout: MicroLayout
    loss: SummedLoss | None
    step: AccumulatingStep
    optimizer: optax.GradientTransformation
    seed: int
    evaluation: Evaluation
    mesh: Mesh | None

    def start(self, model: ModelHandle) -> tuple[State, Any]:
        """Split the model of which the plan was made for an outline, as `make_plan` does."""
        return split(model, self.optimizer, self.seed, self.mesh)

    def with_programs_of(self, other: "Plan") -> "Plan":
        """The plan with the programs of micro batches of another one, which was made with the same options.

        JAX knows what it traced and compiled by the function. The update depends on the number of steps, and stays.
        """
        if self.loss is not other.loss:
            return self
        return dataclasses.replace(self, step=dataclasses.replace(other.step, end=self.step.end))

    def row(self, state: State, metrics: StepMetrics) -> dict[str, float | int]:
        """The row that a step adds to the metrics."""
        return {
            "step": state.step,
            "epoch": state.step / self.epoch,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(self.rate(state.step - 1)),
            "tokens": int(metrics.tokens),
            "computed_tokens": int(metrics.computed),
        }

    def is_evaluated(self, step: int) -> bool:
        """Whether the validation loss is due after a step."""
        return self.validation_data is not None and (step % self.eval_steps == 0 or step == self.max_steps)

    def validation(self, state: State, frozen: PyTree) -> dict[str, float]:
        """Metrics of the validation rows: ``eval_loss`` per label, and the scores of the task that are defined."""
        assert self.validation_data is not None
        batches: Iterable[Batch] = evaluation_batches(self.validation_data, self.layout.rows, self.layout)
        if self.mesh is not None:
            batches = map(partial(place_batch, mesh=self.mesh), batches)
        found = self.evaluation(combine(state.trainable, frozen), batches)
        # A loss that is not finite ends the run; a score that is not, as of equal predictions, is left out.
        defined = {name: value for name, value in found.items() if name == "loss" or math.isfinite(value)}
        return {f"eval_{name}": value for name, value in defined.items()}

    def finished(self, state: State, frozen: PyTree) -> Any:
        """The model to save, whose adapter this process holds whole."""
        model = finished(state.trainable, frozen, state.opt_state)
        return model if self.mesh is None else with_whole_adapters(model, self.mesh)


def make_plan(
    options: Finetune, task: Task, model: ModelHandle, data: Examples, mesh: Mesh | None
) -> tuple[Plan, State, Any]:
    """Build the steps, and split the model into the state at step 0 and the frozen partition.

    On one device the model may be an outline (`peft_jax.cli.finetune.ahead`); the plan is that of the model itself.
    """
    training = options.training
    max_steps, epoch = count_steps(options, data.training), steps_per_epoch(data.training, training.batch_size)
    warmup = default_warmup(max_steps) if training.warmup_steps is None else training.warmup_steps
    assert training.learning_rate is not None  # `with_rate` has filled it in
    rate = make_schedule(training.learning_rate, max_steps, schedule=training.lr_scheduler, warmup_steps=warmup)
    optimizer = make_optimizer(
        rate, optimizer=training.optimizer, weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm
    )
    rows = choose_layout(options, task, model, data, mesh)
    batches = training_batches(data.training, training.batch_size, seed=training.seed, layout=rows)
    if data.sample is not None:
        from peft_jax.train.data.streamed import ReadAhead  # which imports grain

        batches = ReadAhead(batches)
    state, frozen = split(model, optimizer, training.seed, mesh)
    layout = None
    if mesh is not None:
        batches = PlacedBatches(batches, mesh)
        layout = (*shardings((state.trainable, state.opt_state)), NamedSharding(mesh, PartitionSpec()))
    loss = None if data.problem is None else data.problem.loss
    step = make_accumulating_step(
        task.apply,
        optimizer,
        next_token=task.next_token,
        out_shardings=layout,
        base_dropout=not training.no_base_dropout,
        loss=loss,
    )
    compiled_rate = jax.jit(rate)  # else a program for each of its operations
    eval_steps = options.run.eval_steps or epoch
    parts = (task, max_steps, epoch, eval_steps, compiled_rate, batches, data.validation, rows, loss)
    of_experts = None if model.config.routing is None else mesh  # no other model asks for the mesh
    parts_of_step = fields_of(step, field_names(step))
    step = dataclasses.replace(step, **{name: with_mesh_in_use(fn, of_experts) for name, fn in parts_of_step.items()})
    evaluation = with_mesh_in_use(task.make_evaluation(data.problem), of_experts)
    plan = Plan(*parts, step, optimizer, training.seed, evaluation, mesh)
    return plan, state, frozen


def split(
    model: ModelHandle, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None
) -> tuple[State, Any]:
    """Split a model into the state at step 0 and the frozen partition; an outline into their outlines."""
    if mesh is not None:
        state, frozen = start(place(model, mesh), optimizer, seed=seed)
        return place_state(state, mesh), frozen
    if is_outline(model):
        return jax.eval_shape(partial(start, optimizer=optimizer, seed=seed), model)
    trainable, frozen = partition(model)
    begin: Callable[..., Any] = partial(init_optimizer, optimizer)
    if scheduled(model) is None:  # a schedule begins from values
        begin = jax.jit(begin)  # else a program for each array of the optimizer's state
    return State(0, trainable, begin(model), jax.random.key(seed)), frozen


def choose_layout(options: Finetune, task: Task, model: ModelHandle, data: Examples, mesh: Mesh | None) -> MicroLayout:
    """How a run's examples are laid into micro batches."""
    training = options.training
    if options.data.packing:  # over the whole data set
        together = training.micro_batch_size or training.batch_size
        return MicroLayout(together, data.training.lengths, packed=False)
    return choose_micro_layout(
        task,
        model,
        data.parts,
        training.batch_size,
        micro_batch_size=training.micro_batch_size,
        multiple=batch_parts(mesh),
        longest=None if data.sample is None else data.training.lengths[-1],
    )


def count_steps(options: Finetune, data: Data) -> int:
    """Count the optimizer updates of a run."""
    if options.training.max_steps is not None:
        return options.training.max_steps
    epochs = 3 if options.training.epochs is None else options.training.epochs
    return max(1, round(epochs * steps_per_epoch(data, options.training.batch_size)))


def check_mesh(options: Finetune, mesh: Mesh | None) -> None:
    """Raise ValueError if the rows that go through the model at once cannot be split over the mesh."""
    rows = options.training.micro_batch_size or options.training.batch_size
    parts = batch_parts(mesh)
    if rows % parts:
        name = "--micro-batch-size" if options.training.micro_batch_size else "--batch-size"
        axes = "data x fsdp" if mesh is None or mesh.shape["expert"] == 1 else "data x fsdp x expert"
        raise ValueError(f"{name} {rows} cannot be split over {axes} = {parts} devices. Give a multiple of {parts}.")


def surroundings() -> dict[str, Any]:
    """Versions and devices, on which a run's last bits depend beside its settings."""
    devices = jax.devices()
    return {"jax": jax.__version__, "numpy": np.__version__, "devices": f"{len(devices)} {devices[0].device_kind}"}
