"""`peft-jax finetune`: train an adapter on your data, and resume after any interruption."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from peft_jax.cli.finetune import setup as setup
from peft_jax.cli.finetune.adapter_config import attach, choose_task, make_config, settle, with_rate
from peft_jax.cli.finetune.adapter_folder import Beside
from peft_jax.cli.finetune.ahead import compiled_meanwhile, is_outline, outline_of
from peft_jax.cli.finetune.guess import Guess, Planned, guessed, is_worthwhile
from peft_jax.cli.finetune.options import Finetune as Finetune
from peft_jax.cli.finetune.options import check
from peft_jax.cli.finetune.processes import (
    all_or_none,
    check_processes,
    in_any,
    is_first,
    joined,
)
from peft_jax.cli.finetune.results import (
    BEST,
    CHECKPOINTS,
    METRICS,
    TENSORBOARD,
    Curves,
    export,
    in_words,
    save,
    scores_of,
)
from peft_jax.cli.finetune.run_folder import run_folder, stop_on_signal
from peft_jax.cli.finetune.setup import Examples
from peft_jax.cli.finetune.steps import (
    Plan,
    check_mesh,
    count_steps,
    make_plan,
    surroundings,
)
from peft_jax.cli.finetune.streaming import Streams, load_streams, stream_data
from peft_jax.cli.shared.data_sources import Loaded, load_records
from peft_jax.cli.shared.end_token import with_end_token
from peft_jax.cli.shared.progress_bar import Speed, progress
from peft_jax.cli.shared.task import Task
from peft_jax.cli.shared.training_layout import clash, read_layout
from peft_jax.core.finite import non_finite
from peft_jax.core.pytree import PyTree
from peft_jax.core.summary import trainable_parameters
from peft_jax.methods.base import PeftConfig
from peft_jax.models.handles.base import ModelHandle
from peft_jax.prompts.base import virtual_slots
from peft_jax.prompts.tokenizer import Tokenizer, read_tokenizer
from peft_jax.train import State, start, train
from peft_jax.train.divergence import Diverged
from peft_jax.train.mesh import make_mesh, parse_mesh
from peft_jax.train.metrics import MetricsLog, TensorBoard, read_metrics
from peft_jax.train.run_state import Checkpoints


@dataclasses.dataclass
class Best:
    """The best evaluation so far, and how many have followed it that were no better."""

    loss: float | None = None  # None before the first one
    step: int = 0
    since: int = 0

    def note(self, loss: float, step: int) -> bool:
        """Note an evaluation; return whether it is the best."""
        better = self.loss is None or loss < self.loss
        self.loss, self.step, self.since = (loss, step, 0) if better else (self.loss, self.step, self.since + 1)
        return better


def finetune(options: Finetune) -> None:
    """Run the command.

    Raises:
        ValueError: If an option, the data or the checkpoint is unusable; nothing is left behind. Also if a loss, a
            gradient or an update is not finite; what was saved before is kept.
        OSError: If a file or folder is missing or cannot be written.
        KeyboardInterrupt: After Ctrl-C, with what was saved.
    """
    check(options)
    with joined(options.processes):
        mesh = make_mesh(parse_mesh(options.processes.mesh)) if options.processes.mesh else None
        check_processes(mesh)
        check_mesh(options, mesh)
        checkpoints = Checkpoints(options.run.output / CHECKPOINTS, keep=options.run.save_total_limit)
        with run_folder(options.run.output, resume=options.run.resume, saved=lambda: checkpoints.latest) as resume:
            run = dataclasses.replace(options.run, resume=resume)
            _run(dataclasses.replace(options, run=run), mesh, checkpoints)


def _run(options: Finetune, mesh: Mesh | None, checkpoints: Checkpoints) -> None:
    folder = options.run.output
    with all_or_none():
        config = make_config(options.adapter)
        options = with_rate(options, config)
        fingerprint = setup.fingerprint(options, config)
        if options.run.resume:
            setup.refuse_others(checkpoints.notes()["settings"], fingerprint)
        task = choose_task(options, config)
        config = config.replace(task_type=task.name)
        loaded: Loaded = load_streams(options.data) if options.data.streaming else load_records(options.data)
        task.check(loaded.records)
        read = partial(setup.load_base, options.base, task, loaded, options.adapter.adapter)
        outline = outline_of(read) if setup.is_outlined(options, config) and mesh is None else None
        base = read() if outline is None else outline
        tokenizer = read_tokenizer(options.base.model, gguf_file=options.base.gguf_file)
        base = with_end_token(base, tokenizer)
        recorded = read_layout(options.adapter.adapter)
        make_data: Callable[..., Examples] = stream_data if isinstance(loaded, Streams) else setup.make_data
        data_of = partial(
            make_data,
            task,
            tokenizer=tokenizer,
            base=base,
            options=options.data,
            seed=options.training.seed,
            config=config,
            recorded=recorded,
        )
        outlined = partial(_outlined, base, tokenizer, config, options)
        guess: Guess | None = None
        # A run that is resumed has its programs in the cache.
        if outline is not None and not options.run.resume and is_worthwhile(loaded):
            whole = partial(data_of, options=dataclasses.replace(options.data, val_size=0))
            guess = guessed(whole, partial(_planned, options, task, outlined), loaded)
        with compiled_meanwhile(lambda: () if guess is None else guess.programs, all_of_them=False):
            data = data_of(loaded)
        base, attached, model = outlined(data)
        if model is None:
            base = base if outline is None else dataclasses.replace(base, params=read().params)
            model = attached(base)
        longest = 0 if data.sample is None else data.training.lengths[-1]
        setup.check_fit(data.parts, base.config, virtual_slots(model), longest)
        fingerprint["tokens"] = data.digest
    fingerprint["contents"] |= setup.start_digests(folder)
    plan, state, frozen = make_plan(options, task, model, data, mesh)
    if guess is not None:
        plan = plan.with_programs_of(guess.plan)
    if is_outline(model):
        first = plan.batches[checkpoints.latest or 0]
        programs = partial(plan.step.programs, state.trainable, state.opt_state, frozen, first, state.key)
        with compiled_meanwhile(programs):
            model = attached(dataclasses.replace(base, params=read().params))
            state, frozen = plan.start(model)
    summary = trainable_parameters(model)
    print(data.said, summary, sep="\n")
    if note := clash(recorded, [data.layout.used], tokenizer):
        print(note, file=sys.stderr)
    beside = Beside(tokenizer, data.layout)
    print(f"{plan.layout}.")
    state, best = _train(options, plan, state, frozen, checkpoints, fingerprint, beside)
    model = plan.finished(state, frozen)
    if is_first():
        curves = export(model, task, beside, folder, options, summary)
        _say(folder, curves, best, plan.max_steps)


def _outlined(
    base: ModelHandle, tokenizer: Tokenizer, config: PeftConfig, options: Finetune, data: Examples
) -> tuple[ModelHandle, Callable[[ModelHandle], Any], Any]:
    """The base for a run on the data, what attaches the run's adapter to it, and the outline of its result or None."""
    base = with_end_token(base, tokenizer, data.ends)
    config = settle(config, base, options, count_steps(options, data.training))
    attached = partial(attach, config=config, options=options, data=data.training)
    model = outline_of(partial(_known_to_start, attached), base) if is_outline(base) else None
    return base, attached, model


def _planned(
    options: Finetune, task: Task, outlined: Callable[[Examples], tuple[Any, Any, Any]], data: Examples
) -> Planned | None:
    """The plan for an outline of the model on one device, or None where there is no outline."""
    _, _, model = outlined(data)
    return None if model is None else make_plan(options, task, model, data, None)


def _known_to_start(attached: Callable[[ModelHandle], Any], base: ModelHandle) -> Any:
    """The model with its adapter; of an outline an error, where the state at step 0 depends on values."""
    model = attached(base)
    start(model, optax.identity(), seed=0)
    return model


def _train(
    options: Finetune,
    plan: Plan,
    state: State,
    frozen: PyTree,
    checkpoints: Checkpoints,
    fingerprint: dict[str, Any],
    beside: Beside,
) -> tuple[State, Best]:
    """Train from the start or the last checkpoint to the end; return where that was."""
    run, best, size, digest = options.run, Best(), 0, None
    if run.resume:
        state, notes = checkpoints.restore(state)
        setup.refuse_others(notes["settings"], fingerprint)
        _check_restored(state, checkpoints)
        best, size, digest = Best(**notes["best"]), notes["metrics_bytes"], notes["metrics_digest"]
        print(f"Resuming at step {state.step} of {plan.max_steps}.")
        if notes["surroundings"] != surroundings():
            print("The versions or devices are not those it was saved with, so the last bits may differ.")
    else:
        print(f"{plan.max_steps} steps, {plan.epoch} an epoch.")
    patience = math.inf if run.early_stopping is None else run.early_stopping
    last = plan.max_steps if best.since < patience else state.step
    steps = train(plan.step, state, frozen, plan.batches, max_steps=last)

    def keep(state: State) -> None:
        notes = {"settings": fingerprint, "surroundings": surroundings(), "best": dataclasses.asdict(best)}
        checkpoints.save(state, {**notes, "metrics_bytes": log.size, "metrics_digest": log.digest})

    with (
        MetricsLog(run.output / METRICS, size, digest, on=is_first()) as log,
        TensorBoard(run.output / TENSORBOARD, state.step, on=run.tensorboard and is_first()) as board,
        stop_on_signal() as stop,
        _explained(run.output, checkpoints, best, keep),
        progress(steps, plan.max_steps, done=state.step, shown=is_first()) as bar,
    ):
        speed = Speed()
        for state, metrics in bar:
            number, row = state.step, plan.row(state, metrics)
            log.write(row)
            per_second = speed.add(int(metrics.tokens), int(metrics.computed))
            board.write({**row, "tokens_per_second": per_second})
            said = f"loss {row['loss']:.3f}, {per_second:,.0f} tokens/s, {speed.share:.0%} of all computed"
            bar.set_postfix_str(said, refresh=False)
            if plan.is_evaluated(number):
                row = {"step": number, **plan.validation(state, frozen)}
                if not math.isfinite(row["eval_loss"]):
                    found = f"the validation loss is {row['eval_loss']} at step {number}"
                    raise Diverged(found, state=state)
                log.write(row)
                board.write(row)
                if best.note(row["eval_loss"], number):
                    model = plan.finished(state, frozen)
                    if is_first():
                        save(model, plan.task, beside, run.output / BEST, run.output)
            stopped = in_any(stop.requested)
            end = number == plan.max_steps or best.since >= patience
            if end or stopped or number % run.save_steps == 0:
                keep(state)
            speed.skip()
            if stopped and not end:
                raise KeyboardInterrupt
            if end:
                break
    return state, best


def _check_restored(state: State, checkpoints: Checkpoints) -> None:
    """Raise ValueError if a checkpoint holds values that are not finite."""
    if broken := non_finite({"trainable": state.trainable, "opt_state": state.opt_state}):
        raise ValueError(
            f"the checkpoint {checkpoints.folder / str(state.step)} holds NaN or infinity in {broken}. "
            "Remove that folder to go on from the one before."
        )


@contextmanager
def _explained(folder: Path, checkpoints: Checkpoints, best: Best, keep: Callable[[State], None]) -> Iterator[None]:
    """Say in terms of the command why a run stopped that gave values that are not finite, and what is kept of it.

    A folder without a checkpoint is removed. So if it has a best adapter, ``keep`` saves the last good state.
    """
    try:
        yield
    except Diverged as error:
        advice = (
            "Lower the learning rate (--learning-rate) or --max-grad-norm, and start a new run with another --output"
        )
        if best.step and checkpoints.latest is None and error.state is not None:
            keep(error.state)
        if checkpoints.latest is None:
            kept = "No checkpoint was saved"
        else:
            kept = f"The last checkpoint is that of step {checkpoints.latest}, in {checkpoints.folder}"
            if best.step:
                kept += f", and the best adapter that of step {best.step}, in {folder / 'best'}"
        raise Diverged(error.found, f"{advice}. {kept}", error.state) from error


def _say(folder: Path, curves: Curves, best: Best, max_steps: int) -> None:
    losses = [loss for _, loss in curves["training"]]
    if len(losses) < max_steps:
        print(f"Stopped early at step {len(losses)} of {max_steps}: the last {best.since} evaluations were no better.")
    few = max(1, len(losses) // 10)
    first, last = np.mean(losses[:few]), np.mean(losses[-few:])
    print(f"Training loss {first:.3f} -> {last:.3f} (means of the first and last {few} steps).")
    if "validation" in curves:
        final = curves["validation"][-1][1]
        assert best.loss is not None, "an evaluation noted one"
        print(f"Validation loss {final:.3f}, at its best {best.loss:.3f} (step {best.step}, in best/).")
    for name in scores_of(curves):
        print(f"Validation {in_words(name)} {curves[name][-1][1]:.3f}.")
    rows = [row for row in read_metrics(folder / METRICS) if "computed_tokens" in row]
    real, computed = sum(row["tokens"] for row in rows), sum(row["computed_tokens"] for row in rows)
    print(f"{real:,} tokens, and {computed - real:,} of padding beside them ({real / computed:.0%} are real).")
    print(f"Wrote the adapter, loss.png and README.md to {folder}.")
