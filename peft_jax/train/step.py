"""The compiled steps of a run: one that trains, one that evaluates.

Both take a pure ``apply(params, input_ids, attention_mask) -> logits``; for a model handle that is
``lambda model, ids, mask: model(ids, attention_mask=mask).logits``, with ``lazy_logits=True`` in the call of a causal
language model so that memory never holds them all, and for a plain function over adapted leaves
``peft_jax.adapt(fn)``. For packed batches it takes ``segment_ids`` too, for prompts of several tasks ``task_ids``, for
encoder-decoders ``decoder_input_ids``, and for pairs of texts ``token_type_ids``, by these names. A prompt's virtual
tokens may have logits in front of the others.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.dropout import with_dropout
from peft_jax.core.partition import combine
from peft_jax.core.pytree import PyTree
from peft_jax.train.batch_loss import Apply, BatchLoss, Totals, count_labels, has_router_loss, loss_of, losses_of
from peft_jax.train.data.batches import Batch
from peft_jax.train.divergence import finite_or_old
from peft_jax.train.hooks import RunHooks


class StepMetrics(NamedTuple):
    """The results of a training step.

    Attributes:
        loss: Mean over the batch's target tokens in nats, float32; with the routers' loss and the method's penalty, if
            there are such.
        grad_norm: Global norm of the gradient before clipping, float32.
        tokens: Number of the batch's tokens without padding, int32.
        fault: 0, int32; another number if the loss, the gradient's norm or what the step makes of a parameter or of the
            optimizer's state is not finite. The step then gives back the state that it was given. See
            `peft_jax.train.check_finite`.
        computed: Number of the batch's tokens with padding, int32.
    """

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array
    fault: jax.Array
    computed: jax.Array


B = TypeVar("B")
TrainingStep = Callable[[Any, Any, Any, B, jax.Array], tuple[Any, Any, StepMetrics]]
EvaluationStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_training_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    next_token: bool = True,
    micro_batch_size: int | None = None,
    out_shardings: Any = None,
    base_dropout: bool = True,
) -> TrainingStep[Batch]:
    """Build the step ``(trainable, opt_state, frozen, batch, key) -> (trainable, opt_state, metrics)``.

    Gradients are taken with respect to the trainable partition alone. The step is one compiled program, so build it
    once and use it for every run over the same shapes. It takes over the memory of ``trainable`` and ``opt_state``:
    the arguments, and the tree they were split from, cannot be used afterwards.

    A step whose loss, gradient or result is not finite changes nothing and reports it in ``metrics.fault``; see
    `peft_jax.train.check_finite`.

    Where a model's config has ``output_router_logits=True``, the loss has that of its routers, as in transformers. It
    is a product of two means over the tokens of the whole batch, of which the first has no gradient: with micro batches
    a forward pass over all of them comes before, for the first mean, so that parts add up to the same loss.

    Args:
        apply: Pure function from parameters, token ids and attention mask to logits (batch, length, vocabulary), or
            to the `LazyLogits` of a handle.
        optimizer: Any optax transformation, initialized with the trainable partition. A method with a schedule,
            such as AdaLoRA, needs `peft_jax.train.init_optimizer` instead, and the step runs the schedule.
        next_token: Whether logits predict the label at the next position, as a causal language model's do; False for
            classifiers of texts or tokens and for encoder-decoders. See `cross_entropy`.
        micro_batch_size: Rows that go through the model at once; the gradients of a batch's parts are summed in one
            scan. It divides the batch. By default the whole batch at once.
        out_shardings: Shardings of trainable, optimizer state and metrics on a mesh, as `jax.jit` takes them.
        base_dropout: Whether the base model's own dropout is on, as its config says and as in PEFT. False leaves the
            adapter's alone.

    Returns:
        The step; ``key`` is for dropout. The loss is normalised by the target tokens of the whole batch, so that its
        parts weigh as in one.

    Example:
        >>> import peft_jax as pj
        >>> fn = pj.adapt(lambda params, ids, mask: jax.nn.one_hot(ids, 4) @ params["head"]["kernel"])
        >>> params = pj.apply_lora({"head": {"kernel": jnp.zeros((4, 4))}}, pj.LoraConfig(target_modules=["head"]))
        >>> trainable, frozen = pj.partition(params)
        >>> step = make_training_step(fn, optax.sgd(0.1))
        >>> batch = dict(input_ids=jnp.array([[1, 2]]), attention_mask=jnp.ones((1, 2)), labels=jnp.array([[1, 2]]))
        >>> opt_state = optax.sgd(0.1).init(trainable)
        >>> trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, jax.random.key(0))
        >>> round(float(metrics.loss), 4)  # log(4): nothing is learned yet
        1.3863
    """

    def found(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> BatchLoss:
        params = with_dropout(combine(trainable, frozen), key, base=base_dropout)
        return losses_of(apply, params, batch, next_token)

    def loss_share(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, whole: Totals) -> jax.Array:
        return found(trainable, frozen, batch, key).summed(whole) / whole.labels

    def step(
        trainable: PyTree, opt_state: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, StepMetrics]:
        rows = batch["input_ids"].shape[0]
        micro_rows = rows if micro_batch_size is None else micro_batch_size
        is_whole = micro_rows == rows
        # A penalty has the noise of the batch, or of the first micro batch.
        given, hooks = (trainable, opt_state), RunHooks(frozen, key if is_whole else jax.random.fold_in(key, 0))
        trainable = hooks.project(trainable)
        whole = Totals(count_labels(frozen, batch, next_token), None)
        gradient_of = jax.value_and_grad(loss_share)
        if is_whole:
            loss, gradients = gradient_of(trainable, frozen, batch, key, whole)
        else:
            parts = jax.tree.map(lambda x: _in_parts(x, micro_rows), batch)
            numbered = parts, jnp.arange(rows // micro_rows)

            def load(part: Any) -> Any:
                micro_batch, number = part
                return found(trainable, frozen, micro_batch, jax.random.fold_in(key, number)).own.load

            if has_router_loss(frozen):
                loads = jax.lax.map(load, numbered)
                whole = whole._replace(load=jax.tree.map(lambda part: part.sum(axis=0), loads))

            def add(sums: Any, part: Any) -> Any:
                micro_batch, number = part
                own = gradient_of(trainable, frozen, micro_batch, jax.random.fold_in(key, number), whole)
                return jax.tree.map(jnp.add, sums, own), None

            zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable)
            (loss, gradients), _ = jax.lax.scan(add, zeros, numbered)
        return updated(optimizer, hooks, given, loss, gradients, count_tokens(batch))

    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


def updated(
    optimizer: optax.GradientTransformation,
    hooks: RunHooks,
    given: tuple[Any, Any],
    loss: jax.Array,
    gradients: Any,
    tokens: tuple[jax.Array, jax.Array],
) -> tuple[Any, Any, StepMetrics]:
    """End a step: penalty, optimizer, schedule, and the state that was given if the new one is not finite.

    Args:
        optimizer: The optimizer.
        hooks: Those of the step.
        given: The trainable partition and the optimizer's state before the step. The gradients are those of the
            partition once it is projected.
        loss: Mean over the batch's labels.
        gradients: Its gradients.
        tokens: From `count_tokens`, of the whole batch.
    """
    loss, gradients = hooks.penalize(loss, gradients, hooks.project(given[0]))
    grad_norm = optax.tree.norm(jax.tree.map(lambda one: one.astype(jnp.float32), gradients))

    @jax.jit  # called twice, and so traced once
    def update(given: tuple[Any, Any], gradients: Any) -> tuple[Any, Any]:
        trainable = hooks.project(given[0])
        opt_state, schedule = hooks.split(trainable, given[1])
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            updates, opt_state = optimizer.update(gradients, opt_state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return hooks.advance(trainable, gradients, opt_state, schedule)

    (trainable, opt_state), fault = finite_or_old(update, given, gradients, loss, grad_norm)
    real, computed = tokens
    return trainable, opt_state, StepMetrics(loss, grad_norm, real, fault, computed)


def count_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Count a batch's tokens without and with padding, int32."""
    mask = jnp.asarray(batch["attention_mask"])
    return jnp.sum(mask, dtype=jnp.int32), jnp.int32(mask.size)


def _in_parts(x: jax.Array, size: int) -> jax.Array:
    """(batch, ...) as (parts, size, ...), rows dealt out in turn, so that a batch split over devices stays so."""
    return jnp.swapaxes(jnp.reshape(x, (size, x.shape[0] // size, *x.shape[1:])), 0, 1)


def make_evaluation_step(apply: Apply, *, next_token: bool = True) -> EvaluationStep:
    """Build the compiled step ``(params, batch) -> (summed loss, number of targets)``, without dropout.

    The loss is that of the labels alone, also where training has that of routers.

    Args:
        apply: As `make_training_step` takes it.
        next_token: As there.
    """

    def step(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return loss_of(apply, params, batch, next_token)

    return jax.jit(step)


def evaluate(step: EvaluationStep, params: PyTree, batches: Iterable[Batch]) -> float:
    """Mean loss in nats over all target tokens of the batches; ``step`` is from `make_evaluation_step`.

    Raises:
        ValueError: If there is no target token, as in empty texts.
    """
    totals, counts = [], []
    for batch in batches:
        total, count = step(params, batch)
        totals.append(float(total))
        counts.append(int(count))
    tokens = sum(counts)
    if not tokens:
        raise ValueError("no token of the data is learned, so that there is no loss. Give records with an answer.")
    return sum(totals) / tokens
