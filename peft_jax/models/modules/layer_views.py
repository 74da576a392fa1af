"""The view of each kind of layer: the part of a text that it sees (all, a window, a chunk), and how positions turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from peft_jax.core.selecting import only
from peft_jax.models.config import CHUNKED, FULL, SLIDING, ModelConfig
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.positions import Places
from peft_jax.models.modules.rope_parameters import RopeParameters
from peft_jax.models.modules.rotary import Rotation, rotation


class Steps(NamedTuple):
    """The new tokens, for layers that read a text token by token into a memory of fixed size.

    Attributes:
        real: Whether it is no padding, bool ``(batch or 1, length)``; None if no token is.
        text: The number of its text in the row, int ``(batch, length)``; None for one text a row.
    """

    real: jax.Array | None = None
    text: jax.Array | None = None


class View(NamedTuple):
    """The mask, the rotation and the bias of the layers of one kind.

    Attributes:
        mask: What a query may see, bool ``(batch or 1, length, n_virtual + kv_len)``.
        turn: How queries and keys are turned; None if they are not.
        query_factor: What queries are multiplied by ``(batch or 1, length, 1, 1)``; None for nothing.
        bias: What is added to scores, as in `attend`, alike for all kinds; None for nothing.
        steps: The tokens, for layers that read them one by one.
    """

    mask: jax.Array
    turn: Rotation | None = None
    query_factor: jax.Array | None = None
    bias: jax.Array | None = None
    steps: Steps = Steps()


def masks_by_kind(
    places: Places,
    inputs: ForwardInputs,
    kinds: Collection[str],
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> dict[str, jax.Array]:
    """The mask of each kind of layer, bool ``(batch or 1, length, n_virtual + kv_len)``.

    Windows and chunks are counted in slots, as transformers counts them, whatever the positions.

    Args:
        places: Positions and mask of the inputs.
        inputs: The inputs.
        kinds: `FULL`, `SLIDING` and `CHUNKED`, those of them that there are.
        window: How many slots (its own included) a token of a sliding layer sees.
        chunk: How many slots a chunk has; they are counted from a row's first token.

    Example:
        >>> from peft_jax.models.modules.positions import causal_places
        >>> inputs = ForwardInputs()
        >>> masks = masks_by_kind(causal_places(1, 3, inputs), inputs, [SLIDING], window=2)
        >>> masks[SLIDING][0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    masks = {FULL: places.mask}
    if window is None and chunk is None:
        return only(masks, kinds)
    query = (jnp.arange(places.mask.shape[1]) + places.index + inputs.virtual)[None, :, None]
    key = jnp.arange(places.mask.shape[2])[None, None, :]
    if window is not None:
        masks[SLIDING] = places.mask & (key > query - window)
    if chunk is not None:
        first: jax.Array | int = inputs.virtual
        if inputs.attention_mask is not None:
            first = inputs.virtual + jnp.argmax(inputs.attention_mask != 0, axis=1)[:, None, None]
        masks[CHUNKED] = places.mask & ((key - first) // chunk == (query - first) // chunk)
    return only(masks, kinds)


def steps_of(places: Places, inputs: ForwardInputs) -> Steps:
    """The new tokens of the inputs: which are padding, and which text each is of.

    Args:
        places: Positions and mask of the inputs.
        inputs: The inputs.

    Example:
        >>> from peft_jax.models.modules.positions import causal_places
        >>> inputs = ForwardInputs(attention_mask=jnp.array([[0, 1, 1]]), segment_ids=jnp.array([[7, 7, 2]]))
        >>> steps = steps_of(causal_places(1, 3, inputs), inputs)
        >>> steps.real.astype(int).tolist(), steps.text.tolist()
        ([[0, 1, 1]], [[0, 0, 1]])
    """
    real, text = None, None
    if inputs.attention_mask is not None:
        first, length = places.index + inputs.virtual, places.mask.shape[1]
        new = jax.lax.dynamic_slice_in_dim(places.mask, first, length, axis=2)
        real = jnp.diagonal(new, axis1=1, axis2=2)  # a token sees itself unless it is padding
    if inputs.segment_ids is not None:
        starts = inputs.segment_ids[:, 1:] != inputs.segment_ids[:, :-1]
        text = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (1, 0)))
    return Steps(real, text)


def rotations_by_kind(
    ropes: Mapping[str, RopeParameters | None],
    head_dim: int | Mapping[str, int],
    places: Places,
    max_positions: int,
    dtype: DTypeLike,
    *,
    interleaved: bool = False,
) -> dict[str, Rotation | None]:
    """The rotation of each kind of layer; kinds of the same rope share it.

    Args:
        ropes: The rope of each kind; None turns nothing.
        head_dim: Features of a head, of all kinds or by kind.
        places: Positions of the inputs.
        max_positions: The model's ``max_position_embeddings``.
        dtype: Element type of the rotations.
        interleaved: As in `rotation`.
    """
    made: dict[tuple[RopeParameters, int], Rotation] = {}
    turns: dict[str, Rotation | None] = {}
    for kind, rope in ropes.items():
        if rope is None:
            turns[kind] = None
            continue
        size = head_dim if isinstance(head_dim, int) else head_dim[kind]
        if (rope, size) not in made:
            made[rope, size] = rotation(rope, size, places.positions, max_positions, dtype, interleaved=interleaved)
        turns[kind] = made[rope, size]
    return turns


def views_by_kind(
    config: ModelConfig,
    ropes: Mapping[str, RopeParameters | None],
    places: Places,
    inputs: ForwardInputs,
    dtype: DTypeLike,
    *,
    window: int | None = None,
    chunk: int | None = None,
    interleaved: bool = False,
) -> dict[str, View]:
    """The view of each kind of layer of a config, for heads of one size; arguments as in the functions above."""
    kinds = set(config.kinds)
    masks = masks_by_kind(places, inputs, kinds, window=window, chunk=chunk)
    size, length = config.head_size, config.max_position_embeddings
    used = only(ropes, sorted(kinds))
    turns = rotations_by_kind(used, size, places, length, dtype, interleaved=interleaved)
    return {kind: View(masks[kind], turns[kind]) for kind in sorted(kinds)}


def chosen(views: Mapping[str, View], kinds: Sequence[str], which: jax.Array) -> View:
    """The view of a layer whose kind is known in the compiled program alone.

    Args:
        views: The views of all kinds.
        kinds: Kinds by number.
        which: The number of the layer's kind.
    """
    masks = [views[kind].mask for kind in kinds]
    turns = [views[kind].turn for kind in kinds]
    factors = [views[kind].query_factor for kind in kinds]
    present = next((turn for turn in turns if turn is not None), None)
    turn = None
    if present is not None:
        still = Rotation(jnp.ones_like(present.cos), jnp.zeros_like(present.sin))
        moved = [still if one is None else one for one in turns]
        cos, sin = [one.cos for one in moved], [one.sin for one in moved]
        turn = Rotation(_selected(cos, which), _selected(sin, which))
    factor = None
    if any(one is not None for one in factors):
        factor = _selected([jnp.ones((1, 1, 1, 1)) if one is None else one for one in factors], which)
    return View(_selected(masks, which), turn, factor, views[kinds[0]].bias)


def _selected(cases: Sequence[jax.Array], which: jax.Array) -> jax.Array:
    """One of several arrays; no choice is made between an array and itself."""
    if all(case is cases[0] for case in cases):
        return cases[0]
    shape = jnp.broadcast_shapes(*(case.shape for case in cases))
    selected: jax.Array = jax.lax.select_n(which, *(jnp.broadcast_to(case, shape) for case in cases))
    return selected
