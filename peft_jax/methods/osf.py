"""OSF: W = U S V' in two parts, of which the one with the large singular values stays and the other is trained.

Nayak et al., 2025, https://arxiv.org/abs/2504.07097, section 3: W' = U_high S_high V_high' + U S V', where U, S and V
start at the small singular values of W and their vectors, and the gradients of U and V are projected onto what is
orthogonal to U_high and V_high. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.bounded_regex import compiled, matches
from peft_jax.core.targets import ALL_LINEAR
from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import unsupported
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import TargetFields

LEFT, VALUES, RIGHT = "U_low", "S_low", "V_low"
FROM_IN, TO_OUT = "low_from_in", "low_to_out"  # the factors of the part that is trained, as the weight has it
KEPT_IN, KEPT_OUT = "V_high", "U_high"


@register("OSF")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OSFConfig(TargetFields, StartsFromWeight, FactoredChange):
    """Trains the part of a matrix with the small singular values, and keeps the rest; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` say. A file has the trained part alone: the base says what
    it takes the place of.

    Attributes:
        effective_rank: Number of singular values that are kept, or their share if it is a float in (0, 1]; None keeps
            half of them.
        rank_pattern: Other values of it by regex: the first that is found in a module's path.
        init_weights: True starts at no change; False at normal numbers.

    Every other field of PEFT's ``OSFConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.eye(8, 6)}}
        >>> params = pj.apply_adapter(params, OSFConfig(effective_rank=4, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'U_low': (6, 2), 'S_low': (2,), 'V_low': (8, 2)}
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {LEFT: ("out", "rank"), VALUES: ("rank",), RIGHT: ("in", "rank")}

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None  # type: ignore[assignment]  # PEFT's default is None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = unsupported(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}
        wrong = {name: rank for name, rank in ranks.items() if rank is not None and rank <= 0}
        if wrong:
            raise ValueError(f"OSF keeps a number of singular values above 0, got {wrong}.")

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """As every method's, with all linear layers where a model has no default."""
        return super().completed({"target_modules": ALL_LINEAR, **defaults})

    @property
    def patterns(self) -> Mapping[str, str]:
        """Those of ranks, which are found anywhere in a path."""
        return {pattern: _anywhere(pattern) for pattern in self.rank_pattern or {}}

    def kept(self, module: str, n_in: int, n_out: int) -> int:
        """Number of singular values of a module that are kept."""
        smaller, rank = min(n_in, n_out), self.effective_rank
        for pattern, own in (self.rank_pattern or {}).items():
            if matches(_anywhere(pattern), module):
                rank = own
                break
        if rank is None:
            return smaller // 2
        is_share = isinstance(rank, float) and rank <= 1
        return min(smaller, int(smaller * rank if is_share else rank))

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The trained vectors and values."""
        kept = self.kept(module, n_in, n_out)
        rank = min(n_in, n_out) - kept
        if not 0 < rank < min(n_in, n_out):
            raise ValueError(
                f"OSF keeps {kept} of the {min(n_in, n_out)} singular values of '{module}'. Keep at least one, and "
                "leave at least one to train."
            )
        return {LEFT: (n_out, rank), VALUES: (rank,), RIGHT: (n_in, rank)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Normal numbers; `init_on` has those of the weight."""
        return jax.random.normal(key, shape)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init`, or the small singular values of the base without other adapters and their vectors."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        parts = self._parts(base, names, adapted)
        if self.init_weights is not False:
            params = {role: jnp.copy(parts[role]) for role in self.axes}  # a step donates these, not the frozen ones
        return params, state | _frozen(parts), base

    def state_on(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The part of the base that is trained anew, as two factors, and the vectors of the part that is kept."""
        return _frozen(self._parts(base, names, adapted))

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + out + 1)`` of each stacked layer."""
        return np.asarray(state["rank"]) * (params[LEFT].shape[-2] + params[RIGHT].shape[-2] + 1)

    def factors(
        self, params: Arrays, state: Arrays, n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """The trained part and, with the opposite sign, the one that it takes the place of."""
        left = _projected(params[LEFT], state[KEPT_OUT])
        right = _projected(params[RIGHT], state[KEPT_IN])
        kind = left.dtype
        first = jnp.concatenate([right * params[VALUES][..., None, :], state[FROM_IN].astype(kind)], axis=-1)
        second = jnp.concatenate([jnp.swapaxes(left, -1, -2), -state[TO_OUT].astype(kind)], axis=-2)
        return first, second

    def _parts(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, jax.Array]:
        """The singular values and vectors of all layers by role, and ``"rank"``; zero where it is not adapted."""
        matrix = base.layout.matrix(base.unadapted.dense()).astype(jnp.float32)
        n_in, n_out = matrix.shape[-2:]
        smaller = min(n_in, n_out)
        kept = [self.kept(name, n_in, n_out) for name in names.flat]
        hits = [number for number, hit in zip(kept, adapted.flat, strict=True) if hit]
        most_kept, most_trained = max(hits), smaller - min(hits)
        layers = []
        for own_kept, layer, hit in zip(kept, matrix.reshape(-1, n_in, n_out), adapted.flat, strict=True):
            number = own_kept if hit else most_kept  # the shapes of a layer that is not adapted, all of it zero
            inputs, values, outputs = jnp.linalg.svd(layer if hit else jnp.zeros_like(layer), full_matrices=False)
            own = {
                LEFT: _padded(outputs.T[:, number:], most_trained),
                VALUES: _padded(values[number:], most_trained),
                RIGHT: _padded(inputs[:, number:], most_trained),
                KEPT_OUT: _padded(outputs.T[:, :number], most_kept),
                KEPT_IN: _padded(inputs[:, :number], most_kept),
                "rank": jnp.asarray(smaller - number, jnp.int32),
            }
            layers.append(own if hit else jax.tree.map(jnp.zeros_like, own))
        found = {}
        for role in layers[0]:
            stacked = jnp.stack([layer[role] for layer in layers])
            found[role] = stacked.reshape(*names.shape, *stacked.shape[1:])
        return found


def _anywhere(pattern: str) -> str:
    """The pattern that matches the whole of what ``pattern`` is found in; flags in front are for it alone."""
    compiled(pattern, "a key of rank_pattern")
    in_front = re.match(r"\(\?([aiLmsux]+)\)", pattern)
    if in_front is None:
        return rf".*({pattern}).*"
    return rf".*(?{in_front[1]}:{pattern[in_front.end() :]}).*"


def _frozen(parts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The frozen arrays of these parts of a weight."""
    weighted = parts[LEFT] * parts[VALUES][..., None, :]
    kept = {role: parts[role] for role in (KEPT_IN, KEPT_OUT, "rank")}
    return {**kept, FROM_IN: parts[RIGHT], TO_OUT: jnp.swapaxes(weighted, -1, -2)}


def _padded(array: Float[Array, "*rows columns"], columns: int) -> Float[Array, "*rows columns"]:
    """The array with zeros behind its columns."""
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, columns - array.shape[-1])])


@jax.custom_jvp
def _projected(
    vectors: Float[Array, "*groups features rank"], kept: Float[Array, "*groups features kept"]
) -> Float[Array, "*groups features rank"]:
    """The vectors, whose gradient is projected onto what is orthogonal to the ``kept`` ones."""
    return vectors


@_projected.defjvp
def _projected_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A change of the vectors, less its part along the ``kept`` ones; the transpose of that is the same."""
    (vectors, kept), (moved, _) = primals, tangents
    kept = kept.astype(moved.dtype)
    return vectors, moved - kept @ (jnp.swapaxes(kept, -1, -2) @ moved)
