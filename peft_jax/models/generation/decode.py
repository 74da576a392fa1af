"""Generation with a KV cache: prefill and decoding in one compiled program, or in two for a stream."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.pytree import PyTree
from peft_jax.models.generation.sampling import Sampling, choose, process
from peft_jax.models.modules.inputs import ForwardInputs

CHUNK = 4  # tokens of a stream that are decoded before they are copied to the host


class Streamer(Protocol):
    """A receiver of tokens while they are generated; transformers' streamers are receivers too."""

    def put(self, value: np.ndarray) -> None:
        """Take the prompts (batch, length) first, then at each step the new token of each row (batch,)."""

    def end(self) -> None:
        """Take the end of the stream."""


class Cache(Protocol):
    """The memory of the positions seen so far, a tree of arrays."""

    @property
    def index(self) -> jax.Array:
        """The number of slots that are filled, a scalar int32."""


class State(NamedTuple):
    """The state of a generation between two tokens."""

    count: jax.Array  # type: ignore[assignment]  # new tokens so far; a field, not the method of tuples
    tokens: jax.Array  # (batch, prompt + new)
    mask: jax.Array  # (batch, prompt + new), 1 on the tokens that are attended to
    positions: jax.Array  # (batch,), of the last token
    done: jax.Array  # (batch,)
    cache: Cache
    key: jax.Array


class CachedModel(Protocol):
    """A model that reads inputs into a cache."""

    @property
    def slots(self) -> int:
        """The number of slots that virtual tokens take in the cache, before the inputs."""

    def first(self, inputs: ForwardInputs) -> Any:
        """Read ids, with mask and positions, into an empty cache; the result has ``.logits`` and ``.cache``."""

    def apply(self, inputs: ForwardInputs) -> Any:
        """Read further ids, with the mask of all positions."""


class Decoder(NamedTuple):
    """A model and the choices of a generation.

    Attributes:
        model: The model.
        eos_token_ids: The tokens that end a row.
        pad_token_id: The token that fills a row after its end.
        sampling: How tokens are chosen.
        renewed_at: How many tokens are in the cache when it is computed again, with the next one; None for never.
    """

    model: CachedModel
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    sampling: Sampling = Sampling()
    renewed_at: int | None = None

    def start(
        self, cache: Cache, input_ids: jax.Array, attention_mask: jax.Array, key: jax.Array, max_new_tokens: int
    ) -> State:
        """Read left-padded prompts and choose the first token.

        Args:
            cache: Empty, for at least ``length + max_new_tokens`` positions beside the slots that the model takes.
            input_ids: (batch, length).
            attention_mask: (batch, length), 0 on the padding at the left.
            key: A JAX random key; greedy decoding ignores it.
            max_new_tokens: The number of tokens to make space for, at least 1.
        """
        padding = ((0, 0), (0, max_new_tokens))
        mask = jnp.pad(attention_mask.astype(jnp.int32), padding)
        out = self._read(input_ids, mask, cache)
        tokens = jnp.pad(input_ids, padding, constant_values=self.pad_token_id)
        last = jnp.sum(attention_mask.astype(jnp.int32), axis=1) - 1
        done = jnp.zeros(len(tokens), bool)
        state = State(jnp.int32(0), tokens, mask, last, done, out.cache, key)
        return self._add(state, out.logits[:, -1])

    def _read(self, input_ids: jax.Array, mask: jax.Array, cache: Cache) -> Any:
        """Read tokens (batch, length) into an empty cache; the mask is that of all tokens there will be."""
        counts = jnp.cumsum(mask[:, : input_ids.shape[1]], axis=1)
        positions = jnp.maximum(counts - 1, 0)
        return self.model.first(
            ForwardInputs(input_ids=input_ids, attention_mask=mask, position_ids=positions, cache=cache)
        )

    def proceed(self, state: State, count: jax.Array | int) -> State:
        """Decode until there are ``count`` new tokens or all rows are done."""

        def is_unfinished(state: State) -> jax.Array:
            return (state.count < count) & ~jnp.all(state.done)

        def step(state: State) -> State:
            logits, cache = self._renewed_or_read_on(state)
            return self._add(state._replace(cache=cache), logits)

        return jax.lax.while_loop(is_unfinished, step, state)

    def _renewed_or_read_on(self, state: State) -> tuple[jax.Array, Cache]:
        """The logits (batch, vocabulary) after the last token, and the cache with it."""
        last_read = state.tokens.shape[1] - 2  # the last token of all is chosen, and not read
        if self.renewed_at is None or self.renewed_at > last_read:
            return self._read_on(state)
        is_time = self._filled(state) == self.renewed_at
        return jax.lax.cond(is_time, self._read_again, self._read_on, state)

    def _read_on(self, state: State) -> tuple[jax.Array, Cache]:
        """Read the last token, after those in the cache."""
        at = self._filled(state)  # index of the last token, which is not in the cache yet
        inputs = ForwardInputs(
            input_ids=jax.lax.dynamic_slice_in_dim(state.tokens, at, 1, axis=1),
            attention_mask=state.mask,
            position_ids=state.positions[:, None],
            cache=state.cache,
        )
        out = self.model.apply(inputs)
        return out.logits[:, -1], out.cache

    def _read_again(self, state: State) -> tuple[jax.Array, Cache]:
        """Read the first ``renewed_at`` tokens and the next one into the emptied cache."""
        length = (self.renewed_at or 0) + 1
        empty = jax.tree.map(jnp.zeros_like, state.cache)
        out = self._read(state.tokens[:, :length], state.mask, empty)
        return out.logits[:, -1], out.cache

    def _filled(self, state: State) -> jax.Array:
        """The number of tokens in the cache."""
        return state.cache.index - self.model.slots

    def _add(self, state: State, logits: jax.Array) -> State:
        """Choose the next token of each row."""
        key, draw = jax.random.split(state.key)
        chosen = choose(process(logits, self.sampling, state.tokens, state.mask), self.sampling, draw)
        chosen = jnp.where(state.done, self.pad_token_id, chosen).astype(state.tokens.dtype)
        stops = jnp.any(chosen[:, None] == jnp.array(self.eos_token_ids, chosen.dtype)[None], axis=1)
        at = self._filled(state)
        return state._replace(
            count=state.count + 1,
            tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, chosen[:, None], at, axis=1),
            mask=jax.lax.dynamic_update_slice_in_dim(state.mask, jnp.ones_like(chosen[:, None]), at, axis=1),
            positions=state.positions + 1,
            done=state.done | stops,
            key=key,
        )


class Programs(NamedTuple):
    """The compiled programs of a generation.

    Attributes:
        whole: ``(params, ids, mask, key) -> (tokens, count)``.
        start: The first part of a stream, ``(params, ids, mask, key) -> state``.
        proceed: Each further part, ``(params, state, count) -> state``; it reuses the memory of its argument.
    """

    whole: Callable[..., Any]
    start: Callable[..., State]
    proceed: Callable[..., State]


def is_widened(params: PyTree) -> bool:
    """Whether most bytes of the parameters are bfloat16, which XLA's CPU backend multiplies as float32."""
    if jax.default_backend() != "cpu":
        return False
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "nbytes")]
    narrow = sum(leaf.nbytes for leaf in leaves if leaf.dtype == jnp.bfloat16)
    return 2 * narrow > sum(leaf.nbytes for leaf in leaves)


def compiler_options(*, widened: bool) -> dict[str, Any] | None:
    """Options of the compiler for a loop over tokens.

    Args:
        widened: Whether XLA converts the weights before each product (bfloat16 on a CPU). Conversions then stay inside
            the loop: memory holds one converted weight, not a second copy of all.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if widened else None


def make_programs(
    decoder: Callable[[Any], Decoder],
    make_cache: Callable[[Any, int, int], Cache],
    max_new_tokens: int,
    *,
    widened: bool,
) -> Programs:
    """Compile a generation.

    Args:
        decoder: Makes a decoder of parameters.
        make_cache: Makes an empty cache of parameters, batch size and number of positions.
        max_new_tokens: The largest number of new tokens.
        widened: As in `compiler_options`.
    """
    options = compiler_options(widened=widened)

    def start(params: PyTree, ids: jax.Array, mask: jax.Array, key: jax.Array) -> State:
        cache = make_cache(params, ids.shape[0], ids.shape[1] + max_new_tokens)
        return decoder(params).start(cache, ids, mask, key, max_new_tokens)

    def proceed(params: PyTree, state: State, count: jax.Array | int) -> State:
        return decoder(params).proceed(state, count)

    def run(params: PyTree, ids: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = proceed(params, start(params, ids, mask, key), max_new_tokens)
        return state.tokens, state.count

    return Programs(
        jax.jit(run, compiler_options=options),
        jax.jit(start, compiler_options=options),
        jax.jit(proceed, donate_argnums=1, compiler_options=options),
    )


def stream(
    programs: Programs,
    params: PyTree,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    streamer: Streamer,
) -> tuple[jax.Array, int]:
    """Generate like ``programs.whole``, and pass each token to the streamer as soon as its chunk is decoded."""
    streamer.put(np.asarray(ids))
    state = programs.start(params, ids, mask, key)
    streamed, count = 0, 1
    while True:
        new_tokens = np.asarray(state.tokens)[:, ids.shape[1] + streamed : ids.shape[1] + count]
        for column in new_tokens.T:
            streamer.put(column)
        if count >= max_new_tokens or bool(jnp.all(state.done)):
            break
        state = programs.proceed(params, state, min(count + CHUNK, max_new_tokens))
        streamed, count = count, int(state.count)
    streamer.end()
    return state.tokens, count
