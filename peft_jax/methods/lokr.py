"""LoKr: W' = W + s (W1 ⊗ W2), a Kronecker product, either factor of which may be low-rank; s = alpha / rank.

Yeh et al., 2023, https://arxiv.org/abs/2309.14859, equation 4. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.dropout import drop_change
from peft_jax.core.layout import Layout
from peft_jax.core.selecting import picked
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import kaiming, unsupported
from peft_jax.methods.lycoris import Lycoris
from peft_jax.methods.ranked import add
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

FACTORS = ("lokr_w1", "lokr_w2")


@register("LOKR")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(TargetFields, ExcludeFields, LayerFields, Lycoris):
    """Adds a Kronecker product of two small matrices; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        rank_pattern: Rank by pattern of module paths, where it differs from ``r``.
        alpha_pattern: Alpha by pattern of module paths, where it differs from ``alpha``.
        r: Rank of a factor that is low-rank, at least 1: the second, if twice the rank is below its longer side.
        alpha: Numerator of the scale ``alpha / r``, which counts for full factors too.
        decompose_both: Whether the first factor is low-rank by the same rule.
        decompose_factor: Sides of the first factor, where it divides those of the weight; -1 for near square roots.
        rank_dropout: Probability of dropping an output of the change in training, in [0, 1).
        module_dropout: Probability of dropping the whole change of a layer in training, in [0, 1).
        init_weights: True starts with W1 zero, ``"lycoris"`` with W2 zero; False at a random change.
        rank_dropout_scale: Whether the outputs that ``rank_dropout`` leaves count more, by the share of them.

    Every other field of PEFT's ``LoKrConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((64, 36))}}
        >>> params = pj.apply_adapter(params, LoKrConfig(r=2, target_modules=["q"]))
        >>> {name: array.shape for name, array in params["q"]["kernel"].params.items()}
        {'lokr_w1': (6, 8), 'lokr_w2_a': (6, 2), 'lokr_w2_b': (2, 8)}
    """

    takes_conv1d: ClassVar[bool] = False
    structural: ClassVar[tuple[str, ...]] = ("rank_dropout_scale",)
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lokr_w1": ("out_1", "in_1"),
        "lokr_w1_a": ("out_1", "rank"),
        "lokr_w1_b": ("rank", "in_1"),
        "lokr_w2": ("out_2", "in_2"),
        "lokr_w2_a": ("out_2", "rank"),
        "lokr_w2_b": ("rank", "in_2"),
    }

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = unsupported(False)
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights is True, False or 'lycoris', got {self.init_weights!r}.")
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ValueError(f"decompose_factor is -1 or at least 1, got {self.decompose_factor}.")

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Each factor ``(out, in)``, or its own two factors."""
        return self._factors(module, n_in, n_out, 1)

    def leaf_shapes(self, module: str, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Those of the matrix; of a convolution the channels are factored, and the second factor has the positions."""
        n_in, n_out = layout.sizes(shape)
        taps = math.prod(picked(shape, layout.taps))
        return self._factors(module, n_in // taps, n_out, taps)

    def _factors(self, module: str, channels: int, n_out: int, taps: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors, or of their own two factors, of a matrix ``(channels * taps, out)``."""
        rows, columns = (factorization(n, self.decompose_factor) for n in (n_out, channels))
        rank, shapes = self.rank(module), dict[str, tuple[int, ...]]()
        for role, n_rows, n_columns in zip(FACTORS, rows, columns, strict=True):
            width = n_columns * taps if role == "lokr_w2" else n_columns
            if (role == "lokr_w2" or self.decompose_both) and 2 * rank < max(n_rows, n_columns):
                shapes |= {f"{role}_a": (n_rows, rank), f"{role}_b": (rank, width)}
            else:
                shapes[role] = (n_rows, width)
        return shapes

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random numbers, and zeros for one factor."""
        zeros = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[self.init_weights]
        return jnp.zeros(shape) if role in zeros else kaiming(key, shape, shape[1])

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The full and low-rank factors of each stacked layer."""
        rank = np.asarray(state["rank"])
        total = np.zeros(rank.shape, int)
        for role in FACTORS:
            if role in params:
                total += np.asarray(_is_full(role, params, state)) * int(np.prod(params[role].shape[-2:]))
            if f"{role}_a" in params:
                out, n_in = params[f"{role}_a"].shape[-2], params[f"{role}_b"].shape[-1]
                total += (2 * rank < max(out, n_in)) * rank * (out + n_in)
        return total

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + s (W1 ⊗ W2)``."""
        change = jnp.kron(*(_factor(role, params, state) for role in FACTORS)).T
        return add(matrix, drop_change(change, state, rescale=self.rank_dropout_scale), state)


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """A number as a product of two, the first the smaller; the first is ``factor`` if that divides it.

    Otherwise the first is the largest divisor up to ``factor`` (-1: any) and up to the square root.

    Example:
        >>> factorization(128, -1), factorization(128, 4), factorization(127, -1), factorization(128, 32)
        ((8, 16), (4, 32), (1, 127), (32, 4))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    first = max(n for n in range(1, math.isqrt(dimension) + 1) if dimension % n == 0 and n <= limit)
    return first, dimension // first


def _is_full(role: str, params: Arrays, state: Mapping[str, Any]) -> jax.Array:
    """Whether a layer of a stack, of which some have it in two factors, has this one whole."""
    rank = state["rank"]
    return rank > 0 if f"{role}_a" not in params else 2 * rank >= max(params[role].shape[-2:])


def _factor(role: str, params: Arrays, state: Arrays) -> Float[Array, "part_out part_in"]:
    parts = [jnp.where(_is_full(role, params, state), params[role], 0)] if role in params else []
    parts += [params[f"{role}_a"] @ params[f"{role}_b"]] if f"{role}_a" in params else []
    return sum(parts[1:], parts[0])
