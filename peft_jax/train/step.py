"""The compiled steps of a run: one that trains, one that evaluates.

Both take a pure ``apply(params, input_ids, attention_mask) -> logits``; for a model handle that is
``lambda model, ids, mask: model(ids, attention_mask=mask).logits``, for a plain function over adapted leaves
``peft_jax.adapt(fn)``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.dropout import with_dropout
from peft_jax.core.partition import combine
from peft_jax.train.data import Batch
from peft_jax.train.loss import cross_entropy

Apply = Callable[[Any, Any, Any], jax.Array]
TrainingStep = Callable[[Any, Any, Any, Batch, jax.Array], tuple[Any, Any, jax.Array]]
EvaluationStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_optimizer(learning_rate: float, max_steps: int) -> optax.GradientTransformation:
    """AdamW without decay, gradients clipped to norm 1, with the linear schedule of the field.

    The rate rises over the first twentieth of the steps, a hundred at most, and falls to zero at the last one.

    Example:
        >>> optimizer = make_optimizer(learning_rate=3e-4, max_steps=1000)
    """
    warmup = min(100, max_steps // 20)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, max_steps - warmup),
        ],
        [warmup],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


def make_training_step(apply: Apply, optimizer: optax.GradientTransformation) -> TrainingStep:
    """Build the step ``(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, loss)``.

    Gradients are taken with respect to the trainable twin alone. The step is one compiled program, so build it once
    and use it for every run over the same shapes. It takes over the memory of ``trainable`` and ``opt_state``: what
    was passed in, and the tree it was split from, cannot be used afterwards.

    Args:
        apply: Pure function from parameters, token ids and attention mask to logits (batch, length, vocabulary).
        optimizer: Any optax transformation, initialised with the trainable twin.

    Returns:
        The step. ``loss`` is the mean over the batch's target tokens in nats, float32; ``key`` is for dropout.

    Example:
        >>> import peft_jax as pj
        >>> fn = pj.adapt(lambda params, ids, mask: jax.nn.one_hot(ids, 4) @ params["head"]["kernel"])
        >>> params = pj.apply_lora({"head": {"kernel": jnp.zeros((4, 4))}}, pj.LoraConfig(target_modules=["head"]))
        >>> trainable, frozen = pj.partition(params)
        >>> step = make_training_step(fn, optax.sgd(0.1))
        >>> batch = dict(input_ids=jnp.array([[1, 2]]), attention_mask=jnp.ones((1, 2)), labels=jnp.array([[1, 2]]))
        >>> trainable, state, loss = step(trainable, optax.sgd(0.1).init(trainable), frozen, batch, jax.random.key(0))
        >>> round(float(loss), 4)  # log(4): nothing is learned yet
        1.3863
    """

    def step(trainable: Any, opt_state: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        def mean_loss(trainable: Any) -> jax.Array:
            params = with_dropout(combine(trainable, frozen), key)
            logits = apply(params, batch["input_ids"], batch["attention_mask"])
            total, count = cross_entropy(logits, jnp.asarray(batch["labels"]))
            return total / jnp.maximum(count, 1).astype(jnp.float32)

        loss, gradients = jax.value_and_grad(mean_loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            updates, opt_state = optimizer.update(gradients, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def make_evaluation_step(apply: Apply) -> EvaluationStep:
    """Build the compiled step ``(params, batch) -> (summed loss, number of target tokens)``, without dropout."""

    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(apply(params, batch["input_ids"], batch["attention_mask"]), jnp.asarray(batch["labels"]))

    return jax.jit(step)


def evaluate(step: EvaluationStep, params: Any, batches: Iterable[Batch]) -> float:
    """Mean loss in nats over all target tokens of the batches; ``step`` is from `make_evaluation_step`."""
    sums = [(float(total), int(count)) for total, count in (step(params, batch) for batch in batches)]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)
