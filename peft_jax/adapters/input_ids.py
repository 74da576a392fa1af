"""Hand the token ids of a batch to adapters that depend on them, as an aLoRA on where its invocation is."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.pytree import PyTree

T = TypeVar("T")


@runtime_checkable
class ReadsInputIds(Protocol):
    """A method whose change of a product may depend on the position in a sequence, by the token ids there."""

    @property
    def reads_input_ids(self) -> bool:
        """Whether this config's does."""

    def with_input_ids(
        self, state: Mapping[str, Any], ids: jax.Array, stack: tuple[int, ...], segment_ids: jax.Array | None
    ) -> dict[str, Any]:
        """A leaf's state with what the change needs to know of token ids ``(batch, length)``.

        Args:
            state: Its state.
            ids: The token ids.
            stack: The leaf's stacked shape, which comes first in every array of a state.
            segment_ids: The number of each token's text ``(batch, length)``, where a row holds several.
        """


def reads_input_ids(params: PyTree) -> bool:
    """Whether a tree or model handle has an active adapter that depends on the token ids of its inputs."""
    return any(leaf.active and _reader(leaf) is not None for _, leaf in adapted_leaves(params))


Ids = Int[Array, "batch length"] | Int[np.ndarray, "batch length"]


def with_input_ids(params: T, input_ids: Ids, segment_ids: Ids | None = None) -> T:
    """The tree, or handle, whose adapters that depend on token ids have those of these sequences.

    Args:
        params: Any tree or model handle.
        input_ids: Token ids ``(batch, length)``.
        segment_ids: The number of each token's text ``(batch, length)``, where a row holds several.
    """
    ids = jnp.asarray(input_ids)
    segments = None if segment_ids is None else jnp.asarray(segment_ids)

    def hand_over(_: str, leaf: Adapted) -> Adapted:
        method = _reader(leaf)
        if method is None:
            return leaf
        stack = leaf.layout.stack_shape(leaf.shape)
        return dataclasses.replace(leaf, state=method.with_input_ids(leaf.state, ids, stack, segments))

    changed: T = map_adapted(hand_over, params)
    return changed


def with_invocations(params: T, input_ids: Ids, segment_ids: Ids | None = None) -> T:
    """The tree, or handle, whose aLoRA adapters know where they are invoked in these sequences.

    A `peft_jax.PeftModel` does it by itself. An adapter counts from the start of the last invocation in a row on, in
    products whose inputs are ``(batch, length, ...)``, and in the tokens that are generated after them one by one; in a
    row without invocation it counts nowhere.

    Args:
        params: Any tree or model handle.
        input_ids: Token ids ``(batch, length)``.
        segment_ids: The number of each token's text ``(batch, length)``, where a row holds several texts: then an
            adapter counts from the last invocation of each text on.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(alora_invocation_tokens=[7], target_modules=["q"], init_lora_weights=False)
        >>> params = pj.apply_lora({"q": {"kernel": jnp.zeros((4, 4))}}, config)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> y = f(with_invocations(params, jnp.array([[1, 7, 2]])), jnp.ones((1, 3, 4)))
        >>> jnp.any(y != 0, axis=2).tolist()
        [[False, True, True]]
    """
    return with_input_ids(params, input_ids, segment_ids)


def _reader(leaf: Adapted) -> ReadsInputIds | None:
    method = leaf.method
    return method if isinstance(method, ReadsInputIds) and method.reads_input_ids else None
