"""HRA: W' = H W with H a chain of Householder reflections I - 2 u u' of the inputs.

Yuan et al., 2024, https://arxiv.org/abs/2405.17484, equation 3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_rank, kaiming
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields


@register("HRA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(TargetFields, ExcludeFields, LayerFields, Method):
    """Reflects the inputs of a frozen matrix at trained hyperplanes; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Number of reflections, at least 1. If it is odd they start at random, as in PEFT, and a fresh adapter
            changes the outputs; if it is even they start as pairs that cancel.
        apply_GS: Whether the hyperplanes' normals are made orthogonal (Gram-Schmidt). Pairs cannot be: it goes with
            ``init_weights=False``.
        init_weights: True starts as said at ``r``; False at random.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"hra_only"`` (those of adapted modules).

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, HRAConfig(r=2, target_modules=["q"]))
        >>> params["q"]["kernel"].params["hra_u"].shape
        (8, 2)
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"hra_u": ("in", "rank")}
    structural: ClassVar[tuple[str, ...]] = ("apply_GS",)

    r: int = 8
    apply_GS: bool = False  # noqa: N815  # PEFT's name
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The hyperplanes' normals, of any length."""
        return {"hra_u": (n_in, self.r)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random normals, each twice in a row if there is an even number of them."""
        if not self.init_weights or self.r % 2:
            return kaiming(key, shape, shape[1])
        if self.apply_GS:
            raise ValueError(
                "apply_GS=True makes the reflections orthogonal, and those of a fresh adapter are equal in pairs. "
                "Write init_weights=False."
            )
        return jnp.repeat(kaiming(key, (shape[0], shape[1] // 2), shape[1] // 2), 2, axis=1)

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``H W``, in the adapter's precision."""
        columns = matrix.T.astype(params["hra_u"].dtype)
        reflected = self._reflect(columns, params, state, reverse=False)
        return reflected.T.astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``(x H) W``; what is no plain product needs the merged matrix."""
        if type(product) is not Product:
            return apply_merged(self, params, state, base, x, product)
        reflected = self._reflect(x.astype(params["hra_u"].dtype), params, state, reverse=True)
        return base.apply(reflected.astype(x.dtype), product)

    def _reflect(self, x: jax.Array, params: Arrays, state: Arrays, *, reverse: bool) -> jax.Array:
        """The last axis of ``x`` reflected at one hyperplane after the other; a layer not adapted leaves it."""
        normals = jnp.where(state["hit"], params["hra_u"], 1)
        if self.apply_GS:
            basis, _ = jnp.linalg.qr(normals)  # orthogonal reflections commute: their product is I - 2 B B'
            reflected = x - 2 * (x @ basis) @ basis.T
        else:
            units = normals / jnp.linalg.norm(normals, axis=0, keepdims=True)

            def reflect(x: jax.Array, unit: jax.Array) -> tuple[jax.Array, None]:
                return x - 2 * jnp.tensordot(x @ unit, unit, axes=0), None

            reflected, _ = jax.lax.scan(reflect, x, units.T, reverse=reverse)
        return jnp.where(state["hit"], reflected, x)
