"""EVA: A starts at the principal components of a layer's inputs, and ranks go where these explain most.

Paischer et al., 2024, https://arxiv.org/abs/2410.07170, algorithm 1. Numbers follow PEFT 0.21.2, whose incremental
decomposition is that of scikit-learn: Ross et al., 2008, https://doi.org/10.1007/s11263-007-0075-7, section 2.1.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PASSES = 8


class Components(NamedTuple):
    """Principal components of what was seen so far: rows ``(count, in)``, and their singular values.

    ``mean`` and ``variance`` are those of each input, ``seen`` is the number of tokens.
    """

    rows: jax.Array
    values: jax.Array
    mean: jax.Array
    variance: jax.Array
    seen: jax.Array


class Step(NamedTuple):
    """Components after a batch, the share of the variance that each explains, and its cosine with the one before."""

    components: Components
    explained: jax.Array
    cosines: jax.Array


def moment(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Second moments of the inputs ``(tokens, in)`` that count, with their sums and number in the last row."""
    x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1) * mask[:, None]
    return jnp.matmul(x.T, x, precision="highest")


@partial(jax.jit, static_argnames="count")
def updated(before: Components | None, moments: jax.Array, count: int) -> Step:
    """The components after one more batch; the first has no cosines.

    Args:
        before: Those before it; None if it is the first.
        moments: `moment` of the batch, ``(in + 1, in + 1)``.
        count: Number of components.
    """
    gram, total, n = moments[:-1, :-1], moments[-1, :-1], moments[-1, -1]
    mean = total / n
    spread = gram - n * mean[:, None] * mean[None]
    squares = jnp.diagonal(spread)
    if before is None:
        seen = n
    else:
        seen = before.seen + n
        shift = jnp.sqrt(before.seen / seen * n) * (before.mean - mean)
        weighted = before.values[:, None] * before.rows
        spread = spread + shift[:, None] * shift[None] + jnp.matmul(weighted.T, weighted, precision="highest")
        squares = squares + before.variance * before.seen + shift**2
        mean = (before.mean * before.seen + total) / seen
    values, rows = _largest(spread, count)
    found, explained = Components(rows, values, mean, squares / seen, seen), values**2 / jnp.sum(squares)
    if before is None:
        return Step(found, explained, jnp.full(count, -2.0))
    lengths = jnp.linalg.norm(before.rows, axis=1) * jnp.linalg.norm(rows, axis=1)
    return Step(found, explained, jnp.sum(before.rows * rows, axis=1) / lengths)


def _largest(gram: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest singular values of a matrix with this Gram matrix, and right singular vectors, largest entry > 0."""
    wide = min(2 * count, len(gram))
    matmul = partial(jnp.matmul, precision="highest")
    basis, _ = jnp.linalg.qr(matmul(gram, jax.random.normal(jax.random.key(42), (len(gram), wide))))
    for _ in range(PASSES):
        basis, _ = jnp.linalg.qr(matmul(gram, basis))
    squares, turn = jnp.linalg.eigh(matmul(basis.T, matmul(gram, basis)))
    rows = matmul(basis, turn[:, ::-1][:, :count]).T
    signs = jnp.sign(jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=1)[:, None], axis=1))
    return jnp.sqrt(jnp.maximum(squares[::-1][:count], 0)), rows * signs


@dataclasses.dataclass
class Search:
    """Decides from which layers components are asked for still, and how ranks are shared out.

    Attributes:
        counts: Number of components of each layer.
        tau: Cosine from which on a component counts as found.
        same_inputs: Layers whose inputs are those of another one, and the name of that one.
        budget: Sum of all ranks.
    """

    counts: dict[str, int]
    tau: float
    same_inputs: Mapping[str, str]
    budget: int

    def __post_init__(self) -> None:
        self.found: dict[str, Step] = {}
        self.settled = {
            name: np.zeros(count, bool) for name, count in self.counts.items() if name not in self.same_inputs
        }
        self.ranks = dict(self.counts)

    def is_settled(self, name: str) -> bool:
        """Whether all components that a layer's rank asks for are found."""
        return bool(self.settled[name][: self.ranks[name]].all())

    @property
    def is_done(self) -> bool:
        """Whether all layers are settled."""
        return all(map(self.is_settled, self.settled))

    def take(self, moments: Mapping[str, jax.Array]) -> None:
        """Go on with the moments of one more batch, by layer; a batch of fewer tokens than components says nothing."""
        for name in [name for name in self.settled if not self.is_settled(name)]:
            if moments[name][-1, -1] < self.counts[name]:
                continue
            before = self.found[name].components if name in self.found else None
            self.found[name] = jax.device_get(updated(before, moments[name], self.counts[name]))
            self.settled[name] = np.asarray(self.found[name].cosines) >= self.tau
        if self.found.keys() == self.settled.keys():
            self.ranks = self._shared_out()

    def _shared_out(self) -> dict[str, int]:
        """Ranks by the part of the variance that they explain, the largest first."""
        order = [*self.settled, *self.same_inputs]
        explained = {name: self.found[self.same_inputs.get(name, name)].explained for name in order}
        ratios = [(name, ratio) for name in order for ratio in explained[name]]
        best = sorted(range(len(ratios)), key=lambda i: -ratios[i][1])[: self.budget]
        ranks = Counter(ratios[i][0] for i in best)
        shared = {name: ranks[name] for name in order}
        for name, first in self.same_inputs.items():  # of those with the same inputs the first has the largest rank
            if shared[first] < shared[name]:
                shared[first], shared[name] = shared[name], shared[first]
        return shared

    def start(self, name: str, whiten: bool) -> jax.Array:
        """A of a layer, ``(in, rank)``."""
        found, rank = self.found[self.same_inputs.get(name, name)].components, self.ranks[name]
        rows = found.rows[:rank]
        return jnp.asarray((rows / np.sqrt(found.values[:rank])[:, None] if whiten else rows).T)
