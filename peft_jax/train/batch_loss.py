"""The loss of a batch or of a part of it: that of its labels, and that of the routers of a mixture of experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import present
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.models.modules.router_load import RouterLoad
from peft_jax.prompts.base import with_virtual_labels
from peft_jax.prompts.shadow import auxiliary_weight
from peft_jax.train.data.batches import Batch
from peft_jax.train.data.encode import IGNORE
from peft_jax.train.losses import cross_entropy

Apply = Callable[..., jax.Array | LazyLogits]
SummedLoss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]  # of logits and batch: the sum, the number of labels
HANDED_ON = ("segment_ids", "task_ids", "decoder_input_ids", "token_type_ids")  # what apply takes of a batch with it


class Totals(NamedTuple):
    """The facts about a whole batch that the losses of its parts need to add up to its own.

    Attributes:
        count: The number of labels, int32.
        load: The load of the experts; None for a model without a loss of routers.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, not the method of tuples
    load: RouterLoad | None

    @property
    def labels(self) -> jax.Array:
        """The number that the loss of the labels is divided by, float32."""
        return jnp.maximum(self.count, 1).astype(jnp.float32)


class BatchLoss(NamedTuple):
    """The loss of a batch or of a part of it.

    Attributes:
        total: The sum over its labels in nats, float32.
        own: Its own labels and load.
    """

    total: jax.Array
    own: Totals

    def summed(self, whole: Totals) -> jax.Array:
        """The loss times the number of the whole batch's labels; parts add up.

        Args:
            whole: The totals of the whole batch; a load of None is that of this part, which is then all of it.
        """
        load = self.own.load
        if load is None:
            return self.total
        share = load.loss() if whole.load is None else load.share(whole.load)
        return self.total + whole.labels * load.factor * share


def has_router_loss(params: PyTree) -> bool:
    """Whether the loss of a model handle, or of a partition of one, has that of routers."""
    return isinstance(params, CausalLM) and params.asks_routers() and params.has_router_loss


def losses_of(
    apply: Apply, params: PyTree, batch: Batch, next_token: bool, loss: SummedLoss | None = None
) -> BatchLoss:
    """Compute the loss of a batch: that of ``loss`` or the cross entropy, and that of routers.

    Raises:
        ValueError: The model's config asks for the routers' loss and ``apply`` does not give their load, or the other
            way round.
    """
    logits = logits_of(apply, params, batch)
    load = logits.load if isinstance(logits, LazyLogits) else None
    asked = has_router_loss(params)
    if asked and load is None:
        raise ValueError(
            "The model's config has output_router_logits=True, and apply gives logits without the load of the experts. "
            "Call the model with lazy_logits=True in apply, or set the field to False."
        )
    if load is not None and not asked:
        raise ValueError(
            "apply calls the model with output_router_logits=True, and its config has False, by which the step goes. "
            "Set the config's field: dataclasses.replace(model, config=...)."
        )
    total, count = _labels_loss(logits, params, batch, next_token, loss)
    beside = logits.beside if isinstance(logits, LazyLogits) else None
    if beside is None and auxiliary_weight(params):
        raise ValueError(
            "The SHADOW adapter has auxiliary_loss_weight above 0, and apply gives logits without those of its small "
            "network. Call the model with lazy_logits=True in apply, or make the adapter with auxiliary_loss_weight=0."
        )
    if beside is not None:
        total = total + beside.factor * _labels_loss(beside, params, batch, next_token, loss)[0]
    return BatchLoss(total, Totals(count, load))


def loss_of(
    apply: Apply, params: PyTree, batch: Batch, next_token: bool, loss: SummedLoss | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum the loss of a batch's labels, that of ``loss`` or the cross entropy in nats, and count them."""
    return _labels_loss(logits_of(apply, params, batch), params, batch, next_token, loss)


def logits_of(apply: Apply, params: PyTree, batch: Batch) -> Any:
    """Run a model on a batch: logits (batch, length, vocabulary), perhaps lazy, or logits of classes."""
    more = present(dict[str, Any](batch), HANDED_ON)
    return apply(params, batch["input_ids"], batch["attention_mask"], **more)


def count_labels(params: PyTree, batch: Batch, next_token: bool) -> jax.Array:
    """Count the labels of a batch that are not ignored."""
    labels = _labels_of(params, batch)[0][:, 1:] if next_token else jnp.asarray(batch["labels"])
    return jnp.sum(labels != IGNORE)


def _labels_loss(
    logits: Any, params: PyTree, batch: Batch, next_token: bool, loss: SummedLoss | None
) -> tuple[jax.Array, jax.Array]:
    if loss is not None:
        return loss(logits, batch)
    if next_token:
        return cross_entropy(logits, *_labels_of(params, batch))
    labels = jnp.asarray(batch["labels"])
    if labels.ndim == 2 and labels.shape != logits.shape[:-1]:  # virtual tokens have logits too
        labels, _ = with_virtual_labels(params, labels)
    return cross_entropy(logits, labels, next_token=False)


def _labels_of(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
    types = batch.get("input_type_mask")
    return with_virtual_labels(params, jnp.asarray(batch["labels"]), None if types is None else jnp.asarray(types))
