"""Generation of many prompts in few rows: a row whose answer has ended takes the next prompt.

All rows write the same slot of the cache next. A prompt that takes a row over is read into a small cache of its own,
which is then put into the slots right before that one; its last token is read by the next step of all rows. Where the
last slot is near, what all rows hold moves to the front. The tokens that all prompts begin with are read once.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.adapters.input_ids import reads_input_ids
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.decode import compiler_options, is_widened
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.generation.generation_config import Generation
from peft_jax.models.generation.sampling import choose, process
from peft_jax.models.handles.base import ModelHandle, token_ids
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache, Prefix, prefilled
from peft_jax.models.modules.rotary import BY_LENGTH
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import Prompt, take_prompt

STEP = 32  # lengths of prompts and of what they share are multiples of it, so that few programs are compiled
SPARE = 32  # slots beyond the longest row; as many tokens are decoded before rows move to the front


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


def can_fill(config: ModelConfig, params: PyTree) -> bool:
    """Whether rows of a model can take prompts over one by one.

    Those cannot whose numbers depend on the other rows of a batch, as of dynamic and long ropes and of LILY; whose
    layers keep another memory than keys and values; and adapters that are prompts or look at token ids.
    """
    make_cache = family_of(config).init_cache
    if make_cache is None or config.renewed_at is not None or _turns_by_length(config.to_hf()):
        return False
    if take_prompt(params)[1] != Prompt() or reads_input_ids(params):
        return False
    if any(leaf.active and leaf.method.over_rows for _, leaf in adapted_leaves(params)):
        return False
    return isinstance(jax.eval_shape(partial(make_cache, config, 1, 1)), KVCache)


def _turns_by_length(fields: Mapping[str, Any]) -> bool:
    """Whether frequencies of positions depend on the longest row of a batch, by a config's ``rope_parameters``."""
    kinds = [fields.get("rope_parameters") or {}]
    kinds += [value for value in kinds[0].values() if isinstance(value, Mapping)]
    return any(kind.get("rope_type") in BY_LENGTH for kind in kinds)


def fill_rows(
    model: ModelHandle, prompts: Sequence[Sequence[int]], options: GenerateOptions, rows: int, key: jax.Array
) -> Iterator[list[int]]:
    """The new tokens of each prompt, with the one that ends it, for a model of which `can_fill` holds.

    Args:
        model: A causal language model.
        prompts: Token ids, at least one of each.
        options: Options of which none is left out.
        rows: The largest number of answers that are written at once.
        key: As in `FilledRows`.

    Raises:
        ValueError: If a token is not in the vocabulary.
    """
    for ids in prompts:
        token_ids(np.asarray(ids)[None], model.config.vocab_size)
    assert options.max_new_tokens is not None, "the caller has chosen a number"
    choices = Generation(options.max_new_tokens, options.eos_token_ids, options.pad_token_id, options.sampling)
    filled = FilledRows(model.config, model.params, choices, min(rows, len(prompts)), key)
    yield from filled.answers(prompts)


class FilledRows:
    """The answers to prompts, in their order, while `can_fill` holds.

    Args:
        config: The architecture.
        params: The parameters.
        generation: The choices; a token fills rows that have ended.
        rows: Answers that are written at once.
        key: The random key; the draws for a prompt depend on it and on the prompt's number alone.

    Attributes:
        steps: Tokens that each row has decoded so far.
    """

    def __init__(self, config: ModelConfig, params: PyTree, generation: Generation, rows: int, key: jax.Array) -> None:
        self._params, self._generation, self._rows, self._key = params, generation, rows, key
        self._position_rows = config.position_rows
        self._programs = programs(config, generation, widened=is_widened(params))
        self.steps = 0

    def answers(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The new tokens of each prompt, with the one that ends it.

        Args:
            prompts: Token ids, at least one of each.
        """
        shared = self._programs.read(self._params, jnp.asarray(shared_start(prompts), jnp.int32)[None])
        size = len(shared.ids)
        width, slots = self._sizes(max(map(len, prompts)) - size, size)
        span = size + width
        rows = self._programs.empty(self._params, self._rows, slots, span)
        waiting = deque(range(len(prompts)))
        owners: list[int | None] = [None] * self._rows
        ended: dict[int, list[int]] = {}
        given = 0
        while waiting or any(owner is not None for owner in owners):
            for numbers, row in _taken(waiting, owners):
                rows = self._programs.take(
                    self._params, rows, shared, self._laid_out(prompts, numbers, row, size, width)
                )
            before = int(rows.cache.index)
            idle = owners.count(None)
            rows = self._programs.proceed(self._params, rows, idle if waiting else self._rows - 1)
            self.steps += int(rows.cache.index) - before
            ended |= _collected(rows, owners)
            while given in ended:
                yield ended.pop(given)
                given += 1
            rows = self._moved(rows, owners, span, slots)

    def _sizes(self, longest: int, size: int) -> tuple[int, int]:
        """The columns of prompts after what they share, and the slots of rows: no more than a table of positions has.

        Args:
            longest: Tokens of the longest prompt after what all share.
            size: Tokens that all share.
        """
        most = size + _rounded_up(longest) + self._generation.max_new_tokens + SPARE
        if self._position_rows is not None:
            most = min(most, max(self._position_rows, size + longest + self._generation.max_new_tokens))
        width = min(_rounded_up(longest), most - size - self._generation.max_new_tokens)
        return width, most

    def _laid_out(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int | None], row: int, size: int, width: int
    ) -> NewPrompts:
        """Prompts by their numbers, without what they share; None fills up."""
        ids, lengths = np.zeros((len(numbers), width), np.int32), np.ones(len(numbers), np.int32)
        for place, number in enumerate(numbers):
            if number is not None:
                own = prompts[number][size:]
                ids[place, : len(own)], lengths[place] = own, len(own)
        is_real = np.array([number is not None for number in numbers])
        keys = jax.vmap(partial(jax.random.fold_in, self._key))(np.array([number or 0 for number in numbers]))
        return NewPrompts(ids, lengths, keys, is_real, row)

    def _moved(self, rows: Rows, owners: Sequence[int | None], span: int, slots: int) -> Rows:
        """The rows, moved to the front if there is no slot left."""
        index = int(rows.cache.index)
        if index + 1 < slots:
            return rows
        positions = np.asarray(rows.positions)
        longest = max((int(positions[row]) for row, owner in enumerate(owners) if owner is not None), default=0)
        return self._programs.move(rows, index - max(span, longest))


def shared_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all of several prompts begin with, as many as a multiple of `STEP`; each keeps one after them.

    Example:
        >>> len(shared_start([[7] * 40, [7] * 33 + [8]])), shared_start([[7] * 40])
        (32, [])
    """
    if len(prompts) < 2:
        return []
    ordered = sorted(map(list, prompts))
    first, last = ordered[0], ordered[-1]  # all between share what these two share
    most = min(map(len, prompts)) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return first[: same - same % STEP]


def _rounded_up(length: int) -> int:
    return -(-length // STEP) * STEP


def _taken(waiting: deque[int], owners: list[int | None]) -> Iterator[tuple[list[int | None], int]]:
    """Give rows without a prompt the next ones: all rows at once if all are free, else one by one.

    Yields:
        Numbers of prompts, None where none is left, and the first row that they take.
    """
    if waiting and all(owner is None for owner in owners):
        for row in range(min(len(owners), len(waiting))):
            owners[row] = waiting.popleft()
        yield list(owners), 0
    for row, owner in enumerate(owners):
        if owner is None and waiting:
            owners[row] = waiting.popleft()
            yield [owners[row]], row


def _collected(rows: Rows, owners: list[int | None]) -> dict[int, list[int]]:
    """The answers that have ended by the numbers of their prompts, whose rows are free from now on."""
    done, tokens, first, counts = map(np.asarray, (rows.done, rows.tokens, rows.first, rows.counts))
    found = {}
    for row, owner in enumerate(owners):
        if owner is not None and done[row]:
            found[owner] = tokens[row, first[row] : first[row] + counts[row]].tolist()
            owners[row] = None
    return found


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
