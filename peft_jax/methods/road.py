"""RoAd: y = R (x W + b), where R turns pairs of outputs by trained angles and scales them.

Liao and Monz, 2024, https://arxiv.org/abs/2409.00119. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.target_fields import TargetFields

ANGLES, SCALES = "road_theta", "road_alpha"
SHARES = {"road_1": 2, "road_2": 1, "road_4": 0.5}  # outputs an angle


@register("ROAD")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoadConfig(TargetFields, BiasRule, Method):
    """Turns pairs of outputs of a layer, its bias included, and scales them; fields and defaults are PEFT's.

    Outputs are in groups. The pairs of a group are of one output of its first half and one of its second half.
    It goes on the modules that the fields of `TargetFields` say.

    Attributes:
        variant: ``"road_1"`` has an angle and a scale for each pair, ``"road_2"`` for each output, and ``"road_4"`` two
            for each output.
        group_size: Outputs of a group: an even divisor of a module's outputs.
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, RoadConfig(group_size=2, target_modules=["q"]))
        >>> params["q"]["kernel"].params["road_theta"].shape
        (3,)
    """

    learning_rate: ClassVar[float] = 3e-3
    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {ANGLES: ("turns",), SCALES: ("turns",)}
    structural: ClassVar[tuple[str, ...]] = ("variant", "group_size")

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in SHARES:
            raise ValueError(f"variant is one of {', '.join(SHARES)}, got {self.variant!r}.")
        if self.group_size < 1 or self.group_size % 2:
            raise ValueError(f"group_size is an even number of outputs, got {self.group_size}.")

    def changes_bias(self, module: str) -> bool:
        """Outputs include the bias."""
        return True

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Angles and scales."""
        if n_out % self.group_size:
            raise ValueError(
                f"RoadConfig(group_size={self.group_size}) needs a divisor of the {n_out} outputs of '{module}'."
            )
        size = int(n_out / SHARES[self.variant])
        return {ANGLES: (size,), SCALES: (size,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Angles of zero and scales of one, or random ones about these."""
        noise = 0.0 if self.init_weights else 0.5 * jax.random.normal(key, shape)
        return jnp.full(shape, 1.0 if role == SCALES else 0.0) + noise

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W R'``, in the adapter's precision."""
        return self._turned(params, state, matrix)

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """``R b``."""
        return self._turned(params, state, bias)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``R (x W)``; what is no plain product needs the merged matrix."""
        if type(product) is not Product:
            return apply_merged(self, params, state, base, x, product)
        return self._turned(params, state, base.apply(x, product))

    def _turned(self, params: Arrays, state: Mapping[str, Any], y: jax.Array) -> jax.Array:
        """The last axis of ``y`` turned and scaled; a layer that is not adapted leaves it."""
        own, across = self._columns(params)
        own, across = jnp.where(state["hit"], own, 1), jnp.where(state["hit"], across, 0)
        outputs = y.astype(own.dtype)
        halves = outputs.reshape(*y.shape[:-1], -1, 2, self.group_size // 2)
        first, second = halves[..., 0, :], halves[..., 1, :]
        quarter_turned = jnp.stack([-second, first], axis=-2).reshape(y.shape)
        axes = range(y.ndim - 1)
        turned = outputs * jnp.expand_dims(own, axes) + quarter_turned * jnp.expand_dims(across, axes)
        return turned.astype(y.dtype)

    def _columns(self, params: Arrays) -> tuple[jax.Array, jax.Array]:
        """The factors of each output and of the other one of its pair, ``(out,)``."""
        angles, scales = params[ANGLES], params[SCALES]
        if self.variant == "road_4":  # those of a group's own factors, and then those of the others
            angles, scales = (array.reshape(-1, 2, self.group_size) for array in (angles, scales))
            own, across = scales[:, 0] * jnp.cos(angles[:, 0]), scales[:, 1] * jnp.sin(angles[:, 1])
            return own.ravel(), across.ravel()
        if self.variant == "road_1":  # one for both outputs of a pair
            halves = (array.reshape(-1, self.group_size // 2) for array in (angles, scales))
            angles, scales = (jnp.repeat(array, 2, axis=0).ravel() for array in halves)
        return scales * jnp.cos(angles), scales * jnp.sin(angles)
