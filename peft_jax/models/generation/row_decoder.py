"""Rows of a generation, each with a text of its own, in one cache: what the device computes for them.

All rows write the same slot of the cache next. A prompt that takes a row over is read into a small cache of its own,
which is then put into the slots right before that one; its last token is read by the next step of all rows. Where the
last slot is near, what all rows hold moves to the front (`moved`).
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.decode import compiler_options
from peft_jax.models.generation.generation_config import Generation
from peft_jax.models.generation.sampling import choose, process
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache, Prefix, prefilled
from peft_jax.models.registry import family_of


class Rows(NamedTuple):
    """The rows of a generation between two tokens.

    Attributes:
        tokens: ``(rows, slots)``; the last one of each row, at the cache's index, is not in the cache yet.
        mask: ``(rows, slots)``, True on the row's tokens.
        positions: ``(rows,)``, of the last token in its text.
        first: ``(rows,)``, the slot of the answer's first token.
        counts: ``(rows,)``, tokens of the answer.
        done: ``(rows,)``, whether the answer has ended.
        keys: ``(rows,)``, random keys.
        cache: Keys and values.
    """

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    first: jax.Array
    counts: jax.Array
    done: jax.Array
    keys: jax.Array
    cache: KVCache


class NewPrompts(NamedTuple):
    """Prompts that take over neighbouring rows.

    Attributes:
        ids: Tokens after the shared ones ``(prompts, width)``, padded on the right.
        lengths: ``(prompts,)``, at least 1.
        keys: ``(prompts,)``, random keys.
        is_real: ``(prompts,)``, False for those that only fill up a batch.
        row: The first of the rows.
    """

    ids: jax.Array | np.ndarray
    lengths: jax.Array | np.ndarray
    keys: jax.Array
    is_real: jax.Array | np.ndarray
    row: int


class Shared(NamedTuple):
    """The tokens ``(shared,)`` that all prompts begin with, and their keys and values."""

    ids: jax.Array
    prefix: Prefix


class RowPrograms(NamedTuple):
    """The compiled programs.

    Attributes:
        read: ``(params, ids) -> Shared``.
        empty: ``(params, rows, slots, index) -> Rows``, all of them done.
        take: ``(params, rows, shared, prompts) -> Rows``.
        proceed: ``(params, rows, allowed) -> Rows``: decode while at most ``allowed`` rows are done.
        move: ``(rows, by) -> Rows`` that have given up their first slots.
    """

    read: Callable[..., Shared]
    empty: Callable[..., Rows]
    take: Callable[..., Rows]
    proceed: Callable[..., Rows]
    move: Callable[..., Rows]


class RowsDecoder(NamedTuple):
    """A model that reads prompts into rows, and the choices of a generation.

    Attributes:
        apply: ``(params, inputs) -> output``.
        make_cache: ``(params, rows, slots) -> cache``, empty.
        generation: The choices.
    """

    apply: Callable[[PyTree, ForwardInputs], Any]
    make_cache: Callable[[PyTree, int, int], KVCache]
    generation: Generation

    def read(self, params: PyTree, ids: jax.Array) -> Shared:
        """Read tokens ``(1, shared)``, perhaps none."""
        cache = self.make_cache(params, *ids.shape)
        if ids.shape[1]:
            cache = self.apply(params, ForwardInputs(input_ids=ids, cache=cache, logits_to_keep=1)).cache
        return Shared(ids[0], cache.buffers)

    def empty(self, params: PyTree, rows: int, slots: int, index: jax.Array) -> Rows:
        """Rows that are all done, of which ``index`` slots count as filled."""
        tokens, zeros = jnp.zeros((rows, slots), jnp.int32), jnp.zeros(rows, jnp.int32)
        keys = jnp.broadcast_to(jax.random.key(0), (rows,))
        cache = self.make_cache(params, rows, slots)._replace(index=jnp.asarray(index, jnp.int32))
        return Rows(tokens, tokens != 0, zeros, zeros, zeros, zeros == 0, keys, cache)

    def take(self, params: PyTree, rows: Rows, shared: Shared, prompts: NewPrompts) -> Rows:
        """Put prompts into rows, whose last tokens are still to be read."""
        count, width = prompts.ids.shape
        size, index, row = len(shared.ids), rows.cache.index, prompts.row
        before = index - size - width
        buffers = []
        for buffer, part in zip(rows.cache.buffers, self._buffers(params, shared, prompts), strict=True):
            # The last token is not among them, so that they end one slot before it.
            aligned = jax.vmap(partial(jnp.roll, axis=1), (1, 0), 1)(part, width + 1 - prompts.lengths)
            buffers.append(_put(buffer, aligned, (0, row, before, 0, 0)))
        begin = jnp.broadcast_to(shared.ids[None], (count, size))
        texts = jnp.concatenate([begin, jnp.asarray(prompts.ids, begin.dtype)], axis=1)
        texts = jax.vmap(jnp.roll)(texts, width - prompts.lengths)
        slot = jnp.arange(rows.tokens.shape[1])[None]
        is_own = (slot <= index) & (slot > index - size - prompts.lengths[:, None])
        first = jnp.broadcast_to(index + 1, (count,))
        return Rows(
            tokens=_put(rows.tokens, texts, (row, before + 1)),
            mask=_put(rows.mask, is_own, (row, 0)),
            positions=_put(rows.positions, jnp.asarray(size + prompts.lengths - 1), (row,)),
            first=_put(rows.first, first, (row,)),
            counts=_put(rows.counts, jnp.zeros_like(first), (row,)),
            done=_put(rows.done, ~jnp.asarray(prompts.is_real), (row,)),
            keys=_put(rows.keys, prompts.keys, (row,)),
            cache=KVCache(buffers[0], buffers[1], index),
        )

    def _buffers(self, params: PyTree, shared: Shared, prompts: NewPrompts) -> Prefix:
        """Keys and values of prompts without their last tokens, padded on the right."""
        count, width = prompts.ids.shape
        size, number, lengths = len(shared.ids), jnp.arange(width)[None], prompts.lengths[:, None]
        cache = prefilled(self.make_cache(params, count, size + width), shared.prefix)
        inputs = ForwardInputs(
            input_ids=jnp.asarray(prompts.ids),
            attention_mask=jnp.pad(number < lengths - 1, ((0, 0), (size, 0)), constant_values=True),
            position_ids=size + jnp.minimum(number, lengths - 1),
            cache=cache,
            logits_to_keep=1,
        )
        read: Prefix = self.apply(params, inputs).cache.buffers
        return read

    def proceed(self, params: PyTree, rows: Rows, allowed: jax.Array) -> Rows:
        """Decode while at most ``allowed`` rows are done and a slot is left."""

        def goes_on(rows: Rows) -> jax.Array:
            return (jnp.sum(rows.done) <= allowed) & (rows.cache.index + 1 < rows.tokens.shape[1])

        return jax.lax.while_loop(goes_on, partial(self._step, params), rows)

    def _step(self, params: PyTree, rows: Rows) -> Rows:
        """Read the last token of each row, and choose the next."""
        at = rows.cache.index
        inputs = ForwardInputs(
            input_ids=jax.lax.dynamic_slice_in_dim(rows.tokens, at, 1, axis=1),
            attention_mask=rows.mask,
            position_ids=rows.positions[:, None],
            cache=rows.cache,
            logits_to_keep=1,
        )
        out, sampling = self.apply(params, inputs), self.generation.sampling
        logits = process(out.logits[:, -1], sampling, rows.tokens, rows.mask)
        draws = jax.vmap(jax.random.fold_in)(rows.keys, rows.counts)
        chosen = jax.vmap(lambda row, key: choose(row[None], sampling, key)[0])(logits, draws)
        chosen = jnp.where(rows.done, self.generation.pad_token_id or 0, chosen).astype(rows.tokens.dtype)
        ends = jnp.array(self.generation.eos_token_ids, chosen.dtype)
        is_on = (~rows.done).astype(jnp.int32)
        counts = rows.counts + is_on
        stops = jnp.any(chosen[:, None] == ends[None], axis=1) | (counts >= self.generation.max_new_tokens)
        return rows._replace(
            tokens=_put(rows.tokens, chosen[:, None], (0, at + 1)),
            mask=_put(rows.mask, jnp.ones_like(stops)[:, None], (0, at + 1)),
            positions=rows.positions + is_on,
            counts=counts,
            done=rows.done | stops,
            cache=out.cache,
        )


def moved(rows: Rows, by: jax.Array) -> Rows:
    """The rows without the first ``by`` slots, which hold nothing of those that go on."""
    keys, values = (jnp.roll(buffer, -by, axis=2) for buffer in rows.cache.buffers)
    return rows._replace(
        tokens=jnp.roll(rows.tokens, -by, axis=1),
        mask=jnp.roll(rows.mask, -by, axis=1),
        first=rows.first - by,
        cache=KVCache(keys, values, rows.cache.index - by),
    )


def _put(whole: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)


@functools.lru_cache(maxsize=64)
def programs(config: ModelConfig, generation: Generation, *, widened: bool) -> RowPrograms:
    """The compiled programs, the same for all parameters and prompts."""
    family = family_of(config)
    make_empty: Any = family.init_cache

    def make_cache(params: PyTree, rows: int, slots: int) -> KVCache:
        empty: KVCache = make_empty(config, rows, slots, family.embedding_table(config, params).dtype)
        return empty

    decoder = RowsDecoder(adapt(partial(family.apply, config)), make_cache, generation)
    options = compiler_options(widened=widened)
    return RowPrograms(
        jax.jit(decoder.read, compiler_options=options),
        jax.jit(decoder.empty, static_argnums=(1, 2)),
        jax.jit(decoder.take, donate_argnums=1, compiler_options=options),
        jax.jit(decoder.proceed, donate_argnums=1, compiler_options=options),
        jax.jit(moved, donate_argnums=0),
    )
