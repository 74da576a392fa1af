"""Base class of methods with a rank: ranks and scales by pattern, one for each stacked layer."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.float_types import added
from peft_jax.core.targets import pattern_value
from peft_jax.methods.base import Method
from peft_jax.methods.fields import check_rank


class Ranked(Method):
    """A method whose arrays have an axis ``rank``; smaller ranks of a stack are padded with zeros, which stay zero."""

    r: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)

    def rank(self, module: str) -> int:
        """Rank of the adapter of a module."""
        return int(pattern_value(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """Scale of the adapter of a module."""
        return 1.0

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """Rank and scale of each stacked layer, 0 where it is not adapted."""
        scaling = np.where(adapted, np.vectorize(self.scaling, otypes=[np.float32])(names), 0)
        ranks = self.ranks(names, adapted)
        return {"scaling": jnp.asarray(scaling, jnp.float32), "rank": jnp.asarray(ranks, jnp.int32)}

    def ranks(self, names: np.ndarray, adapted: np.ndarray) -> np.ndarray:
        """Rank of each stacked layer, 0 where it is not adapted."""
        return np.where(adapted, np.vectorize(self.rank, otypes=[np.int32])(names), 0)


def add(
    matrix: Float[Array, "in out"], change: Float[Array, "in out"], state: Mapping[str, Any]
) -> Float[Array, "in out"]:
    """``matrix + scale * change``, added in the precision of the change."""
    return added(matrix, state["scaling"].astype(change.dtype) * change)
