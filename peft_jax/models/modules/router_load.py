"""How evenly routers use their experts: the load balancing loss of Switch Transformers, as transformers computes it.

Fedus et al., 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6, over the tokens of all layers at once.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOAD = ("chosen", "probability", "tokens")


class Routing(NamedTuple):
    """The facts about a model's routers on which their loss depends.

    Attributes:
        asked: Whether a call gives their outputs, and its loss has theirs, unless the call says otherwise.
        top_k: How many experts a token gets.
        factor: What their loss is multiplied by beside the loss of the labels.
        has_loss: Whether they have a loss; if not, a call gives their outputs alone.
    """

    asked: bool
    top_k: int
    factor: float
    has_loss: bool = True


@partial(jax.tree_util.register_dataclass, data_fields=LOAD, meta_fields=("factor",))
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """Sums over tokens, float32, of which the loss is made. Those of parts of a batch add up to those of the batch.

    Attributes:
        chosen: How often each expert was chosen ``(experts,)``, which has no gradient.
        probability: The sum of its probabilities ``(experts,)``.
        tokens: The number of tokens, each counted in all layers ``()``.
        factor: As `Routing` has it.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 2.0], [5.0, 0.0]]])
        >>> even, uneven = jnp.array([[1, 1, 0]]), jnp.array([[1, 0, 1]])
        >>> routing = Routing(asked=True, top_k=1, factor=0.1)
        >>> round(float(router_load(logits, even, routing).loss()), 6)
        1.0
        >>> float(router_load(logits, uneven, routing).loss()) > 1.8
        True
    """

    chosen: jax.Array
    probability: jax.Array
    tokens: jax.Array
    factor: float

    def loss(self) -> jax.Array:
        """The loss, float32 ``()``: the number of experts if all are used alike, more if they are not."""
        return self.share(self)

    def share(self, whole: RouterLoad) -> jax.Array:
        """The part of the loss of a whole batch that is due to these tokens, which are some of the batch's.

        The loss is a product of two means over the batch. Only the second one has a gradient, and it is a sum over
        parts; so the gradients of all parts' shares add up to that of the loss.

        Args:
            whole: The load of the whole batch.
        """
        tokens = jnp.maximum(whole.tokens, 1)
        means = whole.chosen / tokens * (self.probability / tokens)
        return jnp.sum(means) * self.chosen.shape[0]


@partial(jax.jit, static_argnames="routing")
def router_load(logits: jax.Array, mask: jax.Array | None, routing: Routing) -> RouterLoad:
    """Sum up what routers said of a batch.

    Args:
        logits: Their outputs (layers, batch * length, experts).
        mask: 1 on tokens and 0 on padding, (batch, length); columns of virtual tokens that it lacks in front are
            tokens. None if there is no padding.
        routing: The routers.
    """
    layers, rows, experts = logits.shape
    probability = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(logits.dtype)  # rounded as in PyTorch
    _, numbers = jax.lax.top_k(probability, routing.top_k)
    weights = jnp.ones(rows, jnp.float32)
    if mask is not None:
        virtual = rows // mask.shape[0] - mask.shape[1]
        weights = jnp.pad(mask.astype(jnp.float32), ((0, 0), (virtual, 0)), constant_values=1).reshape(-1)
    chosen = jax.nn.one_hot(numbers, experts, dtype=jnp.float32).sum(axis=-2)
    return RouterLoad(
        chosen=jnp.einsum("lre,r->e", chosen, weights),
        probability=jnp.einsum("lre,r->e", probability.astype(jnp.float32), weights),
        tokens=layers * jnp.sum(weights),
        factor=routing.factor,
    )
