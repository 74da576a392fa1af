"""HiRA: W' = W + W ⊙ (A B), a low-rank change in proportion to each weight.

Huang et al., 2025, https://openreview.net/forum?id=TwJrTz9cRS, equation 3. Numbers follow PEFT 0.21.2: on a weight that
has adapters already, the change is in proportion to the weight without them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.dropout import dropout
from peft_jax.core.product import Lookup, Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, kaiming, unsupported
from peft_jax.methods.ranked import Ranked, add
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields


@register("HIRA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HiraConfig(TargetFields, ExcludeFields, LayerFields, Ranked):
    """Changes each weight by a low-rank proportion; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rank of the proportions, at least 1.
        hira_dropout: Probability of zeroing an input of the change in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        init_weights: True (A as PyTorch's Linear, B zero), ``"gaussian"`` or False (both normal).

    PEFT knows ``rank_pattern`` but makes every adapter of rank ``r``; here it is refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, HiraConfig(r=2, target_modules=["q"]))
        >>> params["q"]["kernel"].params["hira_B"].shape
        (2, 6)
    """

    notes_storage: ClassVar[bool] = False
    reads_base: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"hira_A": ("in", "rank"), "hira_B": ("rank", "out")}

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] = unsupported({})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "hira_dropout")
        if self.init_weights not in (True, False, None, "gaussian"):
            raise ValueError(f"init_weights is True, False or 'gaussian', got {self.init_weights!r}.")

    @property
    def dropout_rate(self) -> float:
        """``hira_dropout``."""
        return self.hira_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The two factors of the proportions."""
        return {"hira_A": (n_in, self.rank(module)), "hira_B": (self.rank(module), n_out)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """One factor random, the other zero: B, and A of an embedding."""
        if not self.init_weights:
            return jax.random.normal(key, shape)
        if role == ("hira_A" if lookup else "hira_B"):
            return jnp.zeros(shape)
        if lookup:
            return jax.random.normal(key, shape)
        return (
            jax.random.normal(key, shape) / shape[1]
            if self.init_weights == "gaussian"
            else kaiming(key, shape, shape[0])
        )

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + out)`` of each stacked layer."""
        return np.asarray(state["rank"]) * (params["hira_A"].shape[-2] + params["hira_B"].shape[-1])

    def merge(
        self,
        params: Arrays,
        state: Arrays,
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W + U ⊙ (A B)`` with ``unadapted`` as U, the weight without the adapters under this one; None if U is W."""
        return add(matrix, _change(params, matrix if unadapted is None else unadapted), state)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """That of the merged matrix; with dropout switched on ``x W + dropout(x) (U ⊙ (A B))``."""
        if isinstance(product, Lookup):
            product = product.replace(untrained_row=None)  # PEFT's lookup of the changed weight has no padding_idx
        if "dropout" not in state:
            return apply_merged(self, params, state, base, x, product)
        y = base.apply(x, product)
        change = _change(params, base.layout.matrix(base.unadapted.dense()))
        change = state["scaling"][..., None, None].astype(change.dtype) * change
        update = product.full(dropout(x, state).astype(change.dtype), change)
        return product.added(y, update)


def _change(params: Arrays, matrix: Float[Array, "*groups in out"]) -> Float[Array, "*groups in out"]:
    proportions = params["hira_A"] @ params["hira_B"]
    return matrix.astype(proportions.dtype) * proportions
