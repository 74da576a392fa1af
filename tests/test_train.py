"""Loss, steps and loop: against plain formulas, and one compilation for a whole run."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import peft_jax as pj
from peft_jax.train import (
    Diverged,
    Padded,
    cross_entropy,
    evaluate,
    evaluation_batches,
    make_evaluation_step,
    make_optimizer,
    make_training_step,
    plot_losses,
    start,
    train,
    training_batches,
)
from peft_jax.train.data.encode import IGNORE, Example
from peft_jax.train.divergence import finite_or_old
from peft_jax.train.metrics import MetricsLog, read_metrics

VOCABULARY, WIDTH, LENGTH = 11, 6, 8


def apply(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    hidden = jnp.tanh(params["embed"]["embedding"][ids] @ params["body"]["kernel"])
    return hidden * mask[..., None].astype(hidden.dtype) @ params["head"]["kernel"]


def adapted(seed: int, **fields: Any) -> Any:
    keys = jax.random.split(jax.random.key(7), 3)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH))},
        "body": {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH))},
        "head": {"kernel": jax.random.normal(keys[2], (WIDTH, VOCABULARY))},
    }
    cfg = pj.LoraConfig(r=2, target_modules=["body", "head"], **fields)
    return pj.apply_lora(params, cfg, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def data() -> Padded:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (10, LENGTH)).astype(np.int32)
    labels = np.where(np.arange(LENGTH) > 1, ids, IGNORE).astype(np.int32)
    examples = [Example(ids[row, : row + 4], labels[row, : row + 4]) for row in range(len(ids))]
    return Padded(examples, LENGTH)


def test_cross_entropy_equals_transformers() -> None:
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, LENGTH, VOCABULARY)).astype(np.float32) * 5
    labels = rng.integers(0, VOCABULARY, (3, LENGTH))
    labels[:, :3] = IGNORE
    labels[2] = IGNORE
    total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(labels, jnp.int32))
    want = ForCausalLMLoss(torch.tensor(logits), torch.tensor(labels), vocab_size=VOCABULARY)
    assert int(count) == 2 * (LENGTH - 3)
    np.testing.assert_allclose(float(total) / int(count), float(want), rtol=1e-6)


def test_cross_entropy_of_bf16_logits_is_summed_in_float32() -> None:
    total, count = cross_entropy(jnp.zeros((64, 65, 16), jnp.bfloat16), jnp.zeros((64, 65), jnp.int32))
    assert total.dtype == jnp.float32
    # The sum of 4,096 numbers loses a digit where XLA adds them one after another, as that of JAX 0.10.0 does.
    np.testing.assert_allclose(float(total), int(count) * np.log(16), rtol=1e-5)


def test_a_step_is_the_optimizer_on_the_gradient_of_the_mean(data: Padded) -> None:
    trainable, frozen = pj.partition(adapted(0, init_lora_weights=False))
    batch = next(evaluation_batches(data, 4))
    asked = batch["labels"][:, 1:] != IGNORE
    labels = np.where(asked, batch["labels"][:, 1:], 0)[..., None]

    def mean(trainable: Any) -> jax.Array:
        dense = pj.merge(pj.combine(trainable, frozen))
        log_p = jax.nn.log_softmax(apply(dense, batch["input_ids"], batch["attention_mask"]))[:, :-1]
        chosen = jnp.take_along_axis(log_p, labels, -1)[..., 0]
        return -jnp.mean(chosen, where=asked)

    want_loss, gradients = jax.value_and_grad(mean)(trainable)
    want = jax.tree.map(lambda leaf, gradient: np.asarray(leaf - 0.5 * gradient), trainable, gradients)
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(trainable)]
    step = make_training_step(pj.adapt(apply), optax.sgd(0.5))
    got, _, metrics = step(trainable, optax.sgd(0.5).init(trainable), frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(float(metrics.loss), float(want_loss), rtol=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(float(metrics.grad_norm), norm, rtol=1e-5)
    assert int(metrics.tokens) == int(batch["attention_mask"].sum())
    for one, other, old in zip(jax.tree.leaves(got), jax.tree.leaves(want), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert np.abs(one - old).max() > 1e-3


def test_dropout_acts_in_training_and_not_in_evaluation(data: Padded) -> None:
    optimizer = optax.sgd(0.0)
    step, evaluation = make_training_step(pj.adapt(apply), optimizer), make_evaluation_step(pj.adapt(apply))
    batch = next(evaluation_batches(data, 4))
    for rate in (0.0, 0.5):
        params = adapted(0, init_lora_weights=False, lora_dropout=rate)
        expected = evaluate(evaluation, params, [batch])
        trainable, frozen = pj.partition(params)
        state = optimizer.init(trainable)
        losses = []
        for seed in (1, 2):
            trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(seed))
            losses.append(float(metrics.loss))
        assert (losses[0] == losses[1] and np.isclose(losses[0], expected, rtol=1e-6)) == (rate == 0.0)


def test_the_batch_size_of_an_evaluation_does_not_matter(data: Padded) -> None:
    step, params = make_evaluation_step(pj.adapt(apply)), adapted(0, init_lora_weights=False)
    losses = [evaluate(step, params, evaluation_batches(data, size)) for size in (1, 3, 10, 16)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_the_loop_learns_compiles_once_and_repeats_bit_for_bit(data: Padded) -> None:
    optimizer = make_optimizer(0.05, 60)
    step = make_training_step(pj.adapt(apply), optimizer)
    evaluation = make_evaluation_step(pj.adapt(apply))

    def run(seed: int) -> tuple[list[float], list[float], Any]:
        fresh = adapted(seed)
        held_out = [evaluate(evaluation, fresh, evaluation_batches(data, 4))]
        losses = []
        first, frozen = start(fresh, optimizer, seed=seed)
        for state, metrics in train(step, first, frozen, training_batches(data, 4, seed=seed), max_steps=60):
            losses.append(float(metrics.loss))
            if state.step % 30 == 0:
                so_far = pj.combine(state.trainable, frozen)
                held_out.append(evaluate(evaluation, so_far, evaluation_batches(data, 4)))
        return losses, held_out, pj.combine(state.trainable, frozen)

    first, held_out, params = run(0)
    again, _, same = run(0)
    other, _, _ = run(1)
    assert len(first) == 60 and held_out[0] > held_out[1] > held_out[2]
    assert first == again and first != other
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        assert np.array_equal(one, two)
    assert step._cache_size() == evaluation._cache_size() == 1  # type: ignore[attr-defined]


def test_frozen_weights_do_not_move(data: Padded) -> None:
    optimizer = make_optimizer(0.1, 3)
    base = jax.tree.map(np.asarray, pj.unload(adapted(0)))
    step = make_training_step(pj.adapt(apply), optimizer)
    state, frozen = start(adapted(0), optimizer, seed=0)
    *_, (state, _) = train(step, state, frozen, training_batches(data, 4, seed=0), max_steps=3)
    params = pj.combine(state.trainable, frozen)
    for before, after in zip(jax.tree.leaves(base), jax.tree.leaves(pj.unload(params)), strict=True):
        assert np.array_equal(before, after)


def test_a_loss_that_is_no_number_stops_the_run(data: Padded) -> None:
    optimizer = optax.sgd(3e38)  # what it gives is finite, and too large to compute with
    step = make_training_step(pj.adapt(apply), optimizer)
    with pytest.raises(ValueError, match="the loss is nan at step 2. Lower the learning rate"):
        list(train(step, *start(adapted(0), optimizer, seed=0), training_batches(data, 4, seed=0), max_steps=9))


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    optimizer = make_optimizer(1.0, 40)
    state, rates = optimizer.init(jnp.zeros(())), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(41):
            update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
            rates.append(-float(update))  # Adam's update on a constant gradient is the rate
    np.testing.assert_allclose(rates[:4], [1 / 3, 2 / 3, 1.0, 37 / 38], rtol=1e-4)
    assert abs(rates[-1]) < 1e-6 and all(rate > 0 for rate in rates[:-1])


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    curves = {"training": [(n, 3 / n) for n in range(1, 100)], "held-out": [(0, 3.1), (50, 0.2), (99, 0.1)]}
    plot_losses(tmp_path / "loss.png", curves, title="a run")
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (480, 840) and len(np.unique(picture.reshape(-1, 4), axis=0)) > 10


def test_a_short_run_has_whole_steps_on_its_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: ticks.extend(figure.axes[0].get_xticks()))
    for steps in (2, 4, 20):
        plot_losses(tmp_path / "loss.png", {"training": [(n, 3 / n) for n in range(1, steps + 1)]}, title="a run")
    assert len(ticks) > 9 and all(tick == round(tick) for tick in ticks)


def poisoned(kind: str) -> tuple[Any, Any, str]:
    """A function over adapted leaves and an optimizer that go wrong at the third step, and what is said of it."""
    optimizer = optax.adam(1e-3)
    if kind == "parameters":
        rate = lambda step: jnp.where(step == 2, jnp.inf, 1e-3)  # noqa: E731
        return (
            apply,
            optax.sgd(rate),
            "the update of the parameters 'body.kernel.params.lora_A' is not finite at step 3",
        )
    if kind == "optimizer state":
        broken = optax.GradientTransformation(
            lambda params: (jnp.zeros((), jnp.int32), jnp.array([jnp.inf, 1.0])),  # an infinity of before is no fault
            lambda updates, state, params: (
                jax.tree.map(lambda one: -1e-3 * one, updates),
                (state[0] + 1, jnp.where(state[0] == 2, jnp.nan, state[1])),
            ),
        )
        return apply, broken, "the update of the optimizer state '1' is not finite at step 3"
    return apply, optimizer, f"the {kind} is nan at step 3"


@pytest.mark.parametrize("kind", ["loss", "gradient norm", "parameters", "optimizer state"])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_step_that_is_not_finite_stops_the_run_with_the_last_good_state(kind: str, micro: int | None) -> None:
    run, optimizer, said = poisoned(kind)

    @jax.custom_vjp
    def of_gradient(logits: jax.Array, mask: jax.Array) -> jax.Array:
        return logits

    of_gradient.defvjp(
        lambda logits, mask: (logits, mask),
        lambda mask, slope: (jnp.where(jnp.any(mask > 1), jnp.nan, slope), None),
    )

    def model(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:  # a mask of 2 marks the third step
        logits = run(params, ids, mask)
        if kind == "gradient norm":
            return of_gradient(logits, mask.astype(jnp.float32))
        return jnp.where((kind == "loss") & jnp.any(mask > 1), jnp.nan, logits)

    ids = jnp.array([[1, 2, 3, 4]] * 4)
    batches: Any = [
        {"input_ids": ids, "attention_mask": jnp.full_like(ids, 1 + (n == 2)), "labels": ids} for n in range(4)
    ]
    step = make_training_step(pj.adapt(model), optimizer, micro_batch_size=micro)
    good: Any = None
    with pytest.raises(Diverged, match=re.escape(said)) as caught:
        for state, _ in train(step, *start(adapted(0), optimizer, seed=0), batches, max_steps=4):
            good = jax.tree.map(np.array, (state.trainable, state.opt_state))
    kept = caught.value.state
    assert kept is not None and kept.step == 2 and isinstance(caught.value, ValueError)
    for one, two in zip(jax.tree.leaves(good), jax.tree.leaves((kept.trainable, kept.opt_state)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_schedule_of_adalora_stays_too() -> None:
    config = pj.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, deltaT=1, target_modules=["head"])
    params = pj.apply_adapter({"head": {"kernel": jnp.ones((8, 8))}}, config)
    optimizer = optax.sgd(float("inf"))
    step = make_training_step(pj.adapt(lambda p, ids, mask: jax.nn.one_hot(ids, 8) @ p["head"]["kernel"]), optimizer)
    ids = jnp.array([[1, 2, 3]])
    state, frozen = start(params, optimizer, seed=0)
    before = jax.tree.map(np.array, (state.trainable, state.opt_state))
    batch: Any = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}
    trainable, opt_state, metrics = step(state.trainable, state.opt_state, frozen, batch, state.key)
    assert int(metrics.fault) > 2 and np.isfinite(metrics.loss)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves((trainable, opt_state)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_metrics_are_json_or_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write({"step": 1, "loss": 2.5})
        with pytest.raises(ValueError, match="JSON compliant"):
            log.write({"step": 2, "loss": float("nan")})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_the_axis_fits_the_losses_and_a_line_is_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    noise = np.random.default_rng(0).normal(size=400)
    losses = 2 + np.where(np.arange(400) < 4, 9.0, 0.2 * noise)
    curves = {"training": list(enumerate(losses.tolist(), 1)), "validation": [(100, 2.1), (200, 1.9), (400, 2.0)]}
    plot_losses(tmp_path / "loss.png", curves, title="a run")
    (axes,) = figures[0].axes
    bottom, top = axes.get_ylim()
    assert 0.9 < bottom < min(losses) and top < 6, "the axis begins at 0, or shows the first steps alone"
    points, line, validation, best = axes.get_lines()
    assert points.get_linestyle() == "None" and points.get_alpha() < 0.5
    assert np.std(line.get_ydata()[200:]) < 0.5 * np.std(losses[200:])
    assert abs(np.mean(line.get_ydata()[200:]) - np.mean(losses[200:])) < 0.05
    assert validation.get_marker() == "o" and best.get_marker() == "*" and list(best.get_xdata()) == [200]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training (smoothed)", "validation", "best validation: 1.900"]


def temporaries_of_an_update() -> int:
    """Bytes beside the old state, which is given away, when AdamW's step of 2**20 numbers ends."""
    transformation = optax.adamw(1e-3)

    def update(given: Any, gradients: Any) -> Any:
        updates, state = transformation.update(gradients, given[1], given[0])
        return optax.apply_updates(given[0], updates), state

    def end(given: Any, gradients: Any) -> Any:
        return finite_or_old(update, given, gradients, jnp.float32(1), jnp.float32(1))

    array = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    given = array, jax.eval_shape(transformation.init, array)
    analysis = jax.jit(end, donate_argnums=0).lower(given, array).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


@pytest.mark.usefixtures("optimizing_compiler")
def test_a_new_state_is_written_over_the_old_one_and_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one beside it would be of 12 MiB: the numbers and two moments."""
    with jax.numpy_dtype_promotion("standard"):
        found = temporaries_of_an_update()
        monkeypatch.setattr(jax.lax, "optimization_barrier", lambda arrays: arrays)  # the compiler takes one for both
        assert found < 10 * 2**20 < 12 * 2**20 < temporaries_of_an_update()


def test_data_in_which_nothing_is_learned_have_no_loss() -> None:
    with pytest.raises(ValueError, match="no token of the data is learned"):
        evaluate(lambda params, batch: (jnp.zeros(()), jnp.zeros((), int)), {}, [{}])
