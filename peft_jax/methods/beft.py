"""BEFT: y = x W + b + c with a trained bias c, for layers that have a bias b and for such that have none.

Huang et al., 2025, https://arxiv.org/abs/2509.15974, section 3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.float_types import added
from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.target_fields import TargetFields

UNBIASED = "unbiased"  # in the state of a matrix: which of its layers have no bias of their own


@register("BEFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeftConfig(TargetFields, BiasRule, Method):
    """Adds a trained bias to the outputs of layers; fields and defaults are PEFT's.

    Where a layer has a bias (`peft_jax.apply_adapter` says which leaf it is), the two are one sum. Where it has none,
    the trained one is added to products with the matrix and to lookups in it, and there is nothing to merge it into.

    It goes on the modules that the fields of `TargetFields` say.

    Attributes:
        init_weights: True starts at zeros; False at normal numbers.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"v": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
        >>> params = pj.apply_adapter(params, BeftConfig(target_modules=["v"]))
        >>> params["v"]["kernel"].params["beft_bias"].shape
        (3,)
    """

    learning_rate: ClassVar[float] = 3e-3
    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"beft_bias": ("out",)}

    init_weights: bool = True

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """One bias."""
        return {"beft_bias": (n_out,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros, or normal numbers."""
        return jnp.zeros(shape) if self.init_weights else jax.random.normal(key, shape)

    def changes_bias(self, module: str) -> bool:
        """Always."""
        return True

    def state_beside_bias(self, names: np.ndarray, adapted: np.ndarray, biased: Collection[str]) -> dict[str, Any]:
        """Which layers have no bias, if there are any."""
        alone = adapted & ~np.isin(names.astype(str), list(biased))
        return {UNBIASED: jnp.asarray(alone)} if alone.any() else {}

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """``b + c``."""
        own = jnp.where(state["hit"], params["beft_bias"], 0)
        return added(bias, own)

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The matrix as it is."""
        if UNBIASED in state:
            raise MergeError(
                "BEFT trains a bias for a layer that has none to merge it into. Keep the adapter apart, or give the "
                "layer a bias of zeros."
            )
        return matrix

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W``, and ``c`` where the layer has no bias to which it is added."""
        y = base.apply(x, product)
        if UNBIASED not in state:
            return y
        own = jnp.where(state[UNBIASED][..., None], params["beft_bias"], 0)
        return product.added(y, product.scale(jnp.ones_like(y, own.dtype), own))
