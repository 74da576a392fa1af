"""LoHa: W' = W + s (B1 A1) ⊙ (B2 A2), the elementwise product of two low-rank matrices, with s = alpha / rank.

Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098, proposition 1. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.dropout import drop_change
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import kaiming, unsupported
from peft_jax.methods.lycoris import Lycoris
from peft_jax.methods.ranked import add
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields


@register("LOHA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(TargetFields, ExcludeFields, LayerFields, Lycoris):
    """Adds the elementwise product of two low-rank matrices; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        rank_pattern: Rank by pattern of module paths, where it differs from ``r``.
        alpha_pattern: Alpha by pattern of module paths, where it differs from ``alpha``.
        r: Rank of each of the two matrices, at least 1.
        alpha: Numerator of the scale ``alpha / r``.
        rank_dropout: Probability of dropping an output of the change in training, in [0, 1); the others count more.
        module_dropout: Probability of dropping the whole change of a layer in training, in [0, 1).
        init_weights: True starts at no change; False at a random one.

    Every other field of PEFT's ``LoHaConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, LoHaConfig(r=2, target_modules=["q"]))
        >>> {name: array.shape for name, array in params["q"]["kernel"].params.items()}
        {'hada_w1_a': (6, 2), 'hada_w1_b': (2, 8), 'hada_w2_a': (6, 2), 'hada_w2_b': (2, 8)}
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hada_w1_a": ("out", "rank"),
        "hada_w1_b": ("rank", "in"),
        "hada_w2_a": ("out", "rank"),
        "hada_w2_b": ("rank", "in"),
    }

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = unsupported(False)
    init_weights: bool = True

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Two factors of each of the two matrices ``(out, in)``."""
        first, second = (n_out, self.rank(module)), (self.rank(module), n_in)
        return {"hada_w1_a": first, "hada_w1_b": second, "hada_w2_a": first, "hada_w2_b": second}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random numbers; zeros for the last factor."""
        return jnp.zeros(shape) if role == "hada_w2_b" and self.init_weights else kaiming(key, shape, shape[1])

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``2 * rank * (in + out)`` of each stacked layer."""
        return 2 * np.asarray(state["rank"]) * (params["hada_w1_a"].shape[-2] + params["hada_w1_b"].shape[-1])

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + s (B1 A1) ⊙ (B2 A2)``."""
        change = (params["hada_w1_a"] @ params["hada_w1_b"]) * (params["hada_w2_a"] @ params["hada_w2_b"])
        return add(matrix, drop_change(change.T, state, rescale=True), state)
