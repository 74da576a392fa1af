"""Generation of many prompts in few rows: a row whose answer has ended takes the next prompt.

The tokens that all prompts begin with are read once. `peft_jax.models.generation.row_decoder` has the rows.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.input_ids import reads_input_ids
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.generation.decode import is_widened
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.generation.generation_config import Generation
from peft_jax.models.generation.row_decoder import NewPrompts, Rows, programs
from peft_jax.models.handles.base import ModelHandle, token_ids
from peft_jax.models.modules.kv_cache import KVCache
from peft_jax.models.modules.rotary import BY_LENGTH
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import active_prompts
from peft_jax.prompts.key_values import KeyValuePrompt
from peft_jax.prompts.learning import PromptLearning

STEP = 32  # lengths of prompts and of what they share are multiples of it, so that few programs are compiled
SPARE = 32  # slots beyond the longest row; as many tokens are decoded before rows move to the front


def can_fill(config: ModelConfig, params: PyTree) -> bool:
    """Whether rows of a model can take prompts over one by one.

    Those cannot whose numbers depend on the other rows of a batch, as of dynamic and long ropes and of LILY; whose
    layers keep another memory than keys and values; and adapters that are prompts or look at token ids.
    """
    make_cache = family_of(config).init_cache
    if make_cache is None or is_moved_by_padding(config, params):
        return False
    if active_prompts(params) or reads_input_ids(params):
        return False
    return isinstance(jax.eval_shape(partial(make_cache, config, 1, 1)), KVCache)


def is_moved_by_padding(config: ModelConfig, params: PyTree) -> bool:
    """Whether the numbers of a row depend on the padding before it.

    So it is with virtual tokens before the inputs, since positions are then slots of the cache; with methods whose
    weights are means over a batch; and with ropes that depend on the length of a row.
    """
    if config.renewed_at is not None or _turns_by_length(config.to_hf()):
        return True
    for _, leaf in adapted_leaves(params):
        has_tokens = isinstance(leaf.method, PromptLearning) and not isinstance(leaf.method, KeyValuePrompt)
        if leaf.active and (has_tokens or leaf.method.over_rows):
            return True
    return False


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
            index = int(rows.cache.index)
            self.steps += index - before
            ended |= _collected(rows, owners)
            while given in ended:
                yield ended.pop(given)
                given += 1
            if index + 1 == slots:
                rows = self._programs.move(rows, index - max(span, _longest(rows, owners)))

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


def _longest(rows: Rows, owners: Sequence[int | None]) -> int:
    """The number of tokens that the longest of the rows that go on has in the cache."""
    positions = np.asarray(rows.positions)
    return max((int(positions[row]) for row, owner in enumerate(owners) if owner is not None), default=0)


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
