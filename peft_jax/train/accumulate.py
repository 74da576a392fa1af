"""A training step over micro batches that are run one after another, as many as a batch has, each of its own length."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core.dropout import with_dropout
from peft_jax.core.partition import combine
from peft_jax.core.pytree import PyTree
from peft_jax.train.batch_loss import Apply, BatchLoss, SummedLoss, Totals, has_router_loss, losses_of
from peft_jax.train.data.batches import Batch
from peft_jax.train.hooks import RunHooks
from peft_jax.train.step import StepMetrics, count_tokens, updated


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


@dataclasses.dataclass(frozen=True)
class AccumulatingStep:
    """A `TrainingStep` of a batch in micro batches, from `make_accumulating_step`; its programs are compiled functions.

    Attributes:
        begin: ``(trainable, frozen) -> (projected trainable, sums)``.
        totals: What the loss of routers needs to know of a micro batch.
        add: The sums with those of a micro batch.
        end: The update.
    """

    begin: Any
    totals: Any
    add: Any
    end: Any

    def __call__(
        self, trainable: PyTree, opt_state: PyTree, frozen: PyTree, batch: Sequence[Batch], key: jax.Array
    ) -> tuple[Any, Any, StepMetrics]:
        """Take a step."""
        projected, sums = self.begin(trainable, frozen)
        whole = None
        if _counts_first(frozen, batch):
            for number, micro_batch in enumerate(batch):
                own = self.totals(projected, frozen, micro_batch, key, number)
                whole = own if whole is None else jax.tree.map(jnp.add, whole, own)
        for number, micro_batch in enumerate(batch):
            sums = self.add(sums, projected, frozen, micro_batch, key, number, whole)
        ended: tuple[Any, Any, StepMetrics] = self.end(opt_state, sums, trainable, frozen, key)
        return ended

    def programs(
        self, trainable: PyTree, opt_state: PyTree, frozen: PyTree, batch: Sequence[Batch], key: jax.Array
    ) -> Iterator[jax.stages.Lowered]:
        """Lower the programs of a step one after the other; the step itself then finds what was compiled of them.

        The arguments are those of the step, or `jax.ShapeDtypeStruct` in place of arrays.
        """
        yield from self.programs_of_micro_batches(trainable, frozen, batch, key)
        projected, sums = jax.eval_shape(self.begin, trainable, frozen)
        yield self.begin.lower(trainable, frozen)
        yield self.end.lower(opt_state, sums, trainable, frozen, key)
        for micro_batch in _by_shape(batch) if _counts_first(frozen, batch) else ():
            yield self.totals.lower(projected, frozen, micro_batch, key, 0)

    def programs_of_micro_batches(
        self, trainable: PyTree, frozen: PyTree, micro_batches: Sequence[Batch], key: jax.Array
    ) -> Iterator[jax.stages.Lowered]:
        """Lower the program that adds a micro batch, once for each shape of these, the commonest shape first."""
        projected, sums = jax.eval_shape(self.begin, trainable, frozen)
        whole = None
        if _counts_first(frozen, micro_batches):
            whole = jax.eval_shape(self.totals, projected, frozen, micro_batches[0], key, 0)
        for micro_batch in _by_shape(micro_batches):
            yield self.add.lower(sums, projected, frozen, micro_batch, key, 0, whole)


def _by_shape(micro_batches: Sequence[Batch]) -> list[Batch]:
    """One micro batch of each shape, that of the commonest shape first."""
    found, counts = {}, Counter[Any]()
    for one in micro_batches:
        shapes = tuple(map(np.shape, jax.tree.leaves(one)))
        found[shapes] = one
        counts[shapes] += 1
    return [found[shapes] for shapes, _ in counts.most_common()]


def _counts_first(frozen: PyTree, batch: Sequence[Batch]) -> bool:
    """Whether the loss of routers has to know the whole batch before its parts are added."""
    return len(batch) > 1 and has_router_loss(frozen)


def make_accumulating_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    *,
    next_token: bool = True,
    out_shardings: Any = None,
    base_dropout: bool = True,
    loss: SummedLoss | None = None,
) -> AccumulatingStep:
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
        opt_state: PyTree, sums: Sums, trainable: PyTree, frozen: PyTree, key: jax.Array
    ) -> tuple[Any, Any, StepMetrics]:
        count = jnp.maximum(sums.labels, 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda total, array: (total / count).astype(array.dtype), sums.gradients, trainable)
        state = trainable, opt_state
        hooks = RunHooks(frozen, jax.random.fold_in(key, 0))  # the noise of the first micro batch
        return updated(optimizer, hooks, state, sums.loss / count, gradients, sums.tokens)

    begun, of_sums, of_totals = None, None, None
    if out_shardings is not None:
        partition, _, alike = out_shardings
        of_sums = Sums(alike, partition, alike, (alike, alike))
        begun, of_totals = (partition, of_sums), alike
    begin_compiled = jax.jit(begin, out_shardings=begun)
    totals_compiled = jax.jit(totals, out_shardings=of_totals)
    add_compiled = jax.jit(add, donate_argnums=0, out_shardings=of_sums)
    end_compiled = jax.jit(end, donate_argnums=(0, 2), out_shardings=out_shardings)

    return AccumulatingStep(begin_compiled, totals_compiled, add_compiled, end_compiled)
