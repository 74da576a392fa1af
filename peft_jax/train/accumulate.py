"""A training step over micro batches that are run one after another, as many as a batch has, each of its own length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.dropout import with_dropout
from peft_jax.core.partition import combine
from peft_jax.core.pytree import PyTree
from peft_jax.train.batch_loss import Apply, BatchLoss, SummedLoss, Totals, has_router_loss, losses_of
from peft_jax.train.data.batches import Batch
from peft_jax.train.hooks import RunHooks
from peft_jax.train.step import StepMetrics, TrainingStep, count_tokens, updated


class Sums(NamedTuple):
    """Sums over the micro batches of a step.

    Attributes:
        loss: In nats, float32.
        gradients: Those of the loss, as the trainable partition, float32.
        labels: The number of labels, int32.
        tokens: Tokens without and with padding, int32.
    """

    loss: jax.Array
    gradients: Any
    labels: jax.Array
    tokens: tuple[jax.Array, jax.Array]


def make_accumulating_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    next_token: bool = True,
    out_shardings: Any = None,
    base_dropout: bool = True,
    loss: SummedLoss | None = None,
) -> TrainingStep[Sequence[Batch]]:
    """Build the step ``(trainable, opt_state, frozen, micro_batches, key) -> (trainable, opt_state, metrics)``.

    It is that of `peft_jax.train.make_training_step` for a batch in micro batches, whose number and lengths may change
    from step to step: each length of micro batches is compiled once, and the update once. Sums are taken in float32,
    and loss and gradients are means over the labels of all micro batches, so how examples are dealt out changes
    rounding alone, and which numbers dropout draws. With the loss of routers a forward pass over all micro batches
    comes before, as there; not where there is one alone.

    Args:
        apply: As `make_training_step` takes it.
        optimizer: As there.
        next_token: As there.
        out_shardings: As there.
        base_dropout: As there.
        loss: Of logits and a batch, the sum of the losses of its labels and the number of these; by default their cross
            entropy.

    Example:
        >>> import peft_jax as pj
        >>> fn = pj.adapt(lambda params, ids, mask: jax.nn.one_hot(ids, 4) @ params["head"]["kernel"])
        >>> params = pj.apply_lora({"head": {"kernel": jnp.zeros((4, 4))}}, pj.LoraConfig(target_modules=["head"]))
        >>> trainable, frozen = pj.partition(params)
        >>> step = make_accumulating_step(fn, optax.sgd(0.1))
        >>> part = dict(input_ids=jnp.array([[1, 2]]), attention_mask=jnp.ones((1, 2)), labels=jnp.array([[1, 2]]))
        >>> opt_state = optax.sgd(0.1).init(trainable)
        >>> trainable, opt_state, metrics = step(trainable, opt_state, frozen, [part, part], jax.random.key(0))
        >>> round(float(metrics.loss), 4)  # log(4): nothing is learned yet
        1.3863
    """

    def begin(trainable: PyTree, frozen: PyTree) -> tuple[Any, Sums]:
        trainable = RunHooks(frozen).project(trainable)
        zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), trainable)
        return trainable, Sums(jnp.float32(0), zeros, jnp.int32(0), (jnp.int32(0), jnp.int32(0)))

    def losses(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, number: jax.Array) -> BatchLoss:
        params = with_dropout(combine(trainable, frozen), jax.random.fold_in(key, number), base=base_dropout)
        return losses_of(apply, params, batch, next_token, loss)

    def totals(trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, number: jax.Array) -> Totals:
        return losses(trainable, frozen, batch, key, number).own

    def add(
        sums: Sums,
        trainable: PyTree,
        frozen: PyTree,
        batch: Batch,
        key: jax.Array,
        number: jax.Array,
        whole: Totals | None,
    ) -> Sums:
        def summed(trainable: PyTree) -> tuple[jax.Array, jax.Array]:
            found = losses(trainable, frozen, batch, key, number)
            return found.summed(found.own if whole is None else whole), found.own.count

        (found, count), gradients = jax.value_and_grad(summed, has_aux=True)(trainable)
        gradients = jax.tree.map(lambda total, one: total + one.astype(jnp.float32), sums.gradients, gradients)
        tokens = jax.tree.map(jnp.add, sums.tokens, count_tokens(batch))
        return Sums(sums.loss + found, gradients, sums.labels + count.astype(jnp.int32), tokens)

    def end(
        opt_state: PyTree, sums: Sums, given: Any, trainable: PyTree, frozen: PyTree
    ) -> tuple[Any, Any, StepMetrics]:
        count = jnp.maximum(sums.labels, 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda total, array: (total / count).astype(array.dtype), sums.gradients, trainable)
        state = given, opt_state
        return updated(optimizer, RunHooks(frozen), state, trainable, sums.loss / count, gradients, sums.tokens)

    begun, of_sums, of_totals = None, None, None
    if out_shardings is not None:
        partition, _, alike = out_shardings
        of_sums = Sums(alike, partition, alike, (alike, alike))
        begun, of_totals = (partition, of_sums), alike
    begin_compiled = jax.jit(begin, out_shardings=begun)
    totals_compiled = jax.jit(totals, out_shardings=of_totals)
    add_compiled = jax.jit(add, donate_argnums=0, out_shardings=of_sums)
    end_compiled = jax.jit(end, donate_argnums=(0, 2), out_shardings=out_shardings)

    def step(
        trainable: PyTree, opt_state: PyTree, frozen: PyTree, batch: Sequence[Batch], key: jax.Array
    ) -> tuple[Any, Any, StepMetrics]:
        projected, sums = begin_compiled(trainable, frozen)
        whole = None
        if len(batch) > 1 and has_router_loss(frozen):
            for number, micro_batch in enumerate(batch):
                own = totals_compiled(projected, frozen, micro_batch, key, number)
                whole = own if whole is None else jax.tree.map(jnp.add, whole, own)
        for number, micro_batch in enumerate(batch):
            sums = add_compiled(sums, projected, frozen, micro_batch, key, number, whole)
        ended: tuple[Any, Any, StepMetrics] = end_compiled(opt_state, sums, trainable, projected, frozen)
        return ended

    return step
