"""aLoRA: a LoRA that counts only from the last invocation in a sequence on, so that what is before is the base's.

Greenewald et al., 2025, https://arxiv.org/abs/2504.12397, section 3. Numbers follow PEFT 0.21.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.weight import MergeError

TOKENS, COUNTS = "invocation", "counts"  # in the state: the invocation's ids; of how many last tokens each row is made
COUNTED = "counted"  # in the state, where a row holds several texts: whether each token counts


def with_places(
    state: Mapping[str, Any], ids: jax.Array, stack: tuple[int, ...], segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """The state of a leaf with the places of the invocation in token ids ``(batch, length)``, or in each segment."""
    tokens = state[TOKENS].reshape(-1, state[TOKENS].shape[-1])[0]
    if segment_ids is None:
        return {**state, COUNTS: jnp.broadcast_to(last_counts(ids, tokens), (*stack, len(ids)))}
    counted = after_invocations(ids, segment_ids, tokens)
    return {**state, COUNTED: jnp.broadcast_to(counted, (*stack, *ids.shape))}


def after_invocations(ids: jax.Array, segment_ids: jax.Array, tokens: jax.Array) -> jax.Array:
    """Whether each token stands at or after the start of the last invocation in its segment: ``(batch, length)``.

    Example:
        >>> ids, segments = jnp.array([[7, 8, 1, 7, 1, 7, 8]]), jnp.array([[1, 1, 1, 2, 2, 3, 3]])
        >>> after_invocations(ids, segments, jnp.array([7, 8]))[0].tolist()
        [True, True, True, False, False, True, True]
    """
    batch, length = ids.shape
    changes = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    numbers = jnp.cumsum(changes, axis=1)
    begins = jnp.ones((batch, length), bool)
    for offset in range(len(tokens)):
        after = ((0, 0), (0, offset))
        same_token = jnp.pad(ids[:, offset:] == tokens[offset], after)[:, :length]
        same_segment = jnp.pad(numbers[:, offset:] == numbers[:, : max(length - offset, 0)], after)[:, :length]
        begins &= same_token & same_segment
    slots = jnp.arange(length)[None]
    starts = jnp.where(begins, slots, -1)
    last = jax.vmap(lambda one, number: jax.ops.segment_max(one, number, num_segments=length))(starts, numbers)
    first_counted = jnp.take_along_axis(last, numbers, axis=1)
    return (first_counted >= 0) & (slots >= first_counted)


def last_counts(ids: jax.Array, tokens: jax.Array) -> jax.Array:
    """How many tokens of each row there are from its last invocation on, 0 if there is none.

    Example:
        >>> last_counts(jnp.array([[1, 7, 8, 7, 8], [7, 7, 1, 8, 7]]), jnp.array([7, 8])).tolist()
        [2, 0]
    """
    length, size = ids.shape[1], len(tokens)
    starts = max(length - size + 1, 0)
    here = [ids[:, i : i + starts] == tokens[i] for i in range(size)]
    counts = jnp.where(jnp.all(jnp.stack(here), axis=0), length - jnp.arange(starts)[None], length + 1)
    least = jnp.min(counts, axis=1, initial=length + 1)
    return jnp.where(least > length, 0, least).astype(jnp.int32)


def masked(update: jax.Array, state: Mapping[str, Any]) -> jax.Array:
    """An adapter's update, zero before its invocation.

    Raises:
        MergeError: if it is not known where that is.
    """
    if COUNTED in state:
        counted = state[COUNTED]
        if counted.ndim != 2 or update.shape[:2] != counted.shape:
            raise MergeError(
                f"A product gives {update.shape}, where an adapter with alora_invocation_tokens counts at places of "
                f"{counted.shape}. The first axes have to be batch and length."
            )
        return jnp.where(counted.reshape(*counted.shape, *[1] * (update.ndim - 2)), update, 0)
    if COUNTS not in state:
        raise MergeError(
            "The adapter has alora_invocation_tokens, and counts from where these are found in a sequence on. Tell it: "
            "pj.with_invocations(params, input_ids)."
        )
    counts = state[COUNTS]
    if counts.ndim > 1 or update.shape[:1] != counts.shape:
        raise MergeError(
            f"A product gives {update.shape}, where an adapter with alora_invocation_tokens counts in "
            f"{counts.shape[-1]} rows from their own places on. The first axis has to be the batch."
        )
    length = update.shape[1] if update.ndim > 2 else 1
    counted = jnp.arange(length)[None] >= length - jnp.minimum(counts, length)[:, None]
    rows = counted.shape if update.ndim > 2 else counts.shape
    return jnp.where(counted.reshape(*rows, *[1] * (update.ndim - len(rows))), update, 0)


def invocation_state(tokens: Sequence[int], names: np.ndarray) -> dict[str, Any]:
    """The ids of the invocation, for each stacked layer."""
    ids = jnp.array(tokens, jnp.int32)
    return {TOKENS: jnp.broadcast_to(ids, (*names.shape, len(ids)))}
