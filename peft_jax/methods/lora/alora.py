"""aLoRA: a LoRA that counts only from the last invocation in a sequence on, so that what is before is the base's.

Greenewald et al., 2025, https://arxiv.org/abs/2504.12397, section 3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted, adapted_leaves, map_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.weight import MergeError

T = TypeVar("T")
TOKENS, COUNTS = "invocation", "counts"  # in the state: the invocation's ids; of how many last tokens each row is made


def with_invocations(params: T, input_ids: jax.Array | np.ndarray) -> T:
    """The tree, or handle, whose aLoRA adapters know where they are invoked in these sequences.

    A `peft_jax.PeftModel` does it by itself. An adapter counts from the start of the last invocation in a row on, in
    products whose inputs are ``(batch, length, ...)``, and in the tokens that are generated after them one by one; in a
    row without invocation it counts nowhere.

    Args:
        params: Any tree or model handle.
        input_ids: Token ids ``(batch, length)``.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(alora_invocation_tokens=[7], target_modules=["q"], init_lora_weights=False)
        >>> params = pj.apply_lora({"q": {"kernel": jnp.zeros((4, 4))}}, config)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> y = f(with_invocations(params, jnp.array([[1, 7, 2]])), jnp.ones((1, 3, 4)))
        >>> jnp.any(y != 0, axis=2).tolist()
        [[False, True, True]]
    """
    if isinstance(params, Handle):
        return params.replace(with_invocations(params.params, input_ids))
    ids = jnp.asarray(input_ids)

    def found(_: str, leaf: Adapted) -> Adapted:
        if TOKENS not in leaf.state:
            return leaf
        stack = leaf.layout.stack_shape(leaf.shape)
        tokens = leaf.state[TOKENS].reshape(-1, leaf.state[TOKENS].shape[-1])[0]
        counts = jnp.broadcast_to(last_counts(ids, tokens), (*stack, len(ids)))
        return dataclasses.replace(leaf, state={**leaf.state, COUNTS: counts})

    return map_adapted(found, params)


def is_invoked(params: Any) -> bool:
    """Whether a tree has an active adapter that counts after its invocation only."""
    return any(leaf.active and TOKENS in leaf.state for _, leaf in adapted_leaves(params))


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
