"""DeLoRA: W' = W + λ / r diag(n) A Ξ B, where Ξ divides by the norms of A's columns and B's rows, and λ is trained.

Bini et al., 2025, https://arxiv.org/abs/2503.18225, the update λ ‖W‖ / r B Ξ A. Numbers follow PEFT 0.21.2: n is the
norm of each input's weights, not one norm of them all, and B starts at zero.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import Adapted
from peft_jax.core.dropout import dropout
from peft_jax.core.product import Product
from peft_jax.core.targets import by_end, pattern_value
from peft_jax.core.weight import Weight, as_weight, varying
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, kaiming
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.ranked import Ranked
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

TRAINED, NORM = ("delora_A", "delora_B", "delora_lambda"), "delora_w_norm"
LAMBDA = TRAINED[-1]
SMALLEST = 1e-4  # a norm below it counts as this


@register("DELORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeloraConfig(TargetFields, ExcludeFields, LayerFields, StartsFromWeight, FrozenArrays, Ranked):
    """Adds a low-rank matrix of bounded norm; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rank of the added matrix, at least 1.
        delora_lambda: Start of λ, which bounds the norm of the change in proportion to the weights; it is trained.
        module_dropout: Probability of zeroing an input of the change in training, in [0, 1), as PEFT does by that name.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"delora_only"`` (those of adapted modules).
        init_weights: True starts at no change (A as PyTorch's Linear, B zero); False at a random one.
        rank_pattern: Rank by pattern of module paths, where it differs from ``r``.
        lambda_pattern: Start of λ by pattern of module paths, where it differs from ``delora_lambda``.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, DeloraConfig(r=2, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'delora_A': (8, 2), 'delora_B': (2, 3), 'delora_lambda': (1,)}
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "delora_A": ("in", "rank"),
        "delora_B": ("rank", "out"),
        LAMBDA: ("one",),
        NORM: ("in",),
    }

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    lambda_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "module_dropout")

    @property
    def dropout_rate(self) -> float:
        """``module_dropout``."""
        return self.module_dropout

    @property
    def patterns(self) -> Mapping[str, str]:
        """Those of ranks and of λ."""
        return {pattern: by_end(pattern) for pattern in (*self.rank_pattern, *self.lambda_pattern)}

    @property
    def frozen(self) -> tuple[str, ...]:
        """The norms of the weights."""
        return (NORM,)

    def scaling(self, module: str) -> float:
        """The part of λ that each pair of vectors has."""
        return 1 / self.rank(module)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The vectors, λ, and the norms of the weights of each input."""
        rank = self.rank(module)
        return {"delora_A": (n_in, rank), "delora_B": (rank, n_out), LAMBDA: (1,), NORM: (n_in,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """A random, B zero or random; ones for what `init_on` gives."""
        if role in (LAMBDA, NORM):
            return jnp.ones(shape)
        return jnp.zeros(shape) if role == "delora_B" and self.init_weights else kaiming(key, shape, shape[0])

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init` with each layer's λ, and the norms of the base without the adapters that are on it already."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        start = np.vectorize(lambda name: pattern_value(self.lambda_pattern, name, self.delora_lambda), otypes=[float])
        params[LAMBDA] = jnp.asarray(np.where(adapted, start(names), 0)[..., None], jnp.float32)
        innermost = base
        while isinstance(innermost, Adapted):
            innermost = as_weight(innermost.base, innermost.layout)
        matrix = base.layout.matrix(innermost.dense()).astype(jnp.float32)
        state[NORM] = jnp.where(adapted[..., None], jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-1)), 0)
        return params, state, base

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + out)`` of each stacked layer, and λ."""
        rank = np.asarray(state["rank"])
        return rank * (params["delora_A"].shape[-2] + params["delora_B"].shape[-1]) + (rank > 0)

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + λ / r diag(n) A Ξ B``, added in the adapter's precision."""
        a, b = _factors(params, state)
        return (matrix.astype(a.dtype) + a @ b).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (dropout(x) diag(n) A) Ξ B λ / r``; the low-rank path runs in the adapter's precision."""
        y, (a, b) = base.apply(x, product), _factors(params, state)
        update = product.up(product.down(x if product.looks_up else dropout(x, state), a), b)
        return product.added(y, update)


def _factors(
    params: Arrays, state: Mapping[str, Any]
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """``(in, rank)`` and ``(rank, out)``: the change is their product. Groups, if there are any, come first."""
    kind, (a, b, strength) = params["delora_A"].dtype, (params[role].astype(jnp.float32) for role in TRAINED)
    strength = state["scaling"][..., None] * strength
    a = state[NORM][..., None] * a / _norm(a, -2, strength)
    b = strength[..., None] * b / _norm(b, -1, strength)
    return a.astype(kind), b.astype(kind)


def _norm(vectors: jax.Array, axis: int, strength: jax.Array) -> jax.Array:
    """Of each vector; inside of ``shard_map`` they may be spread over devices, which ``strength`` is not."""
    squares = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
    if spread := varying(vectors) - varying(strength):
        squares = jax.lax.psum(squares, tuple(sorted(spread)))
    return jnp.sqrt(jnp.maximum(squares, SMALLEST**2))  # not the root of zero, which has no gradient
