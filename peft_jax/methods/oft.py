"""OFT: W' = R W with R a block-diagonal rotation of the inputs, made of skew-symmetric matrices Q by Cayley's map.

Qiu et al., 2023, https://arxiv.org/abs/2306.07280, section 3; its Neumann series (I + Q)(1 + Q + Q² + ...), cut off
after a few terms: Qiu et al., 2025, https://arxiv.org/abs/2506.19847. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.product import Lookup, Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability
from peft_jax.methods.rotations import cayley, cayley_series, skew
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields
from peft_jax.methods.training_hooks import TrainingHooks


@register("OFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OFTConfig(TargetFields, ExcludeFields, LayerFields, TrainingHooks, Method):
    """Rotates the inputs of a frozen matrix, the outputs of an embedding; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Number of blocks; 0 to give their size instead.
        oft_block_size: Size of the blocks; 0 to give their number instead. As in PEFT, the nearest divisor of the
            layer's size is taken.
        module_dropout: In training, the share of blocks, chosen at random, that do not rotate; a block that is shared
            rotates always. It is the rule that PEFT has, and forgets to use.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"oft_only"`` (those of adapted modules).
        init_weights: True starts at no rotation; False at random ones.
        coft: Whether rotations are constrained (COFT): the angles of each block count as put back into a ball, where
            each step of training starts.
        eps: With ``coft``, the largest norm of a block's Q, times the square root of the number of blocks.
        block_share: Whether all blocks of a layer are the same.
        use_cayley_neumann: True for the series, which is a rotation up to its error; False for Cayley's map itself,
            whose angles, as in PEFT, have the opposite sign.
        num_cayley_neumann_terms: Number of terms of the series.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, OFTConfig(oft_block_size=4, target_modules=["q"]))
        >>> params["q"]["kernel"].params["oft_R"].shape  # two blocks, of six angles each
        (2, 6)
    """

    takes_conv1d: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "oft_R": ("blocks", "pairs"),
        "oft_embedding_R": ("blocks", "pairs"),
    }
    structural: ClassVar[tuple[str, ...]] = ("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps")

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"OFT takes the number of blocks or their size, got r={self.r} and oft_block_size="
                f"{self.oft_block_size}. Set one of them to 0 and the other above."
            )

        check_probability(self, "module_dropout")
        if self.eps <= 0:
            raise ValueError(f"eps is above 0, got {self.eps}.")
        if self.num_cayley_neumann_terms < 1:
            raise ValueError(f"num_cayley_neumann_terms is at least 1, got {self.num_cayley_neumann_terms}.")

    @property
    def dropout_rate(self) -> float:
        """``module_dropout``."""
        return self.module_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The angles of each block's pairs of axes."""
        size = n_out if lookup else n_in
        block = nearest_divisor(size, self.oft_block_size) if self.oft_block_size else 0
        blocks = size // block if block else nearest_divisor(size, self.r)
        block = block or size // blocks
        role = "oft_embedding_R" if lookup else "oft_R"
        return {role: (1 if self.block_share else blocks, block * (block - 1) // 2)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """No rotation, or small random angles."""
        return jnp.zeros(shape) if self.init_weights else 0.1 * jax.random.normal(key, shape)

    @classmethod
    def check_file(cls, fields: Mapping[str, Any]) -> None:
        """PEFT before 0.16 had another adapter of this name, and before 0.18 another series."""
        version = str(fields.get("peft_version") or "0.18").split("@")[0]
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if "peft_version" in fields and "oft_block_size" not in fields:
            raise ValueError("This OFT adapter has no oft_block_size: it is from PEFT before 0.14. Train it anew.")
        if fields.get("use_cayley_neumann", True) and numbers < (0, 18):
            raise ValueError(
                f"This OFT adapter is from PEFT {version}, whose Cayley-Neumann series was another one before 0.18. "
                "Train it anew."
            )

    def project(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """With ``coft`` the angles in their balls."""
        return {role: self._in_ball(angles) for role, angles in params.items()}

    def _in_ball(self, angles: Float[Array, "*stack blocks pairs"]) -> Float[Array, "*stack blocks pairs"]:
        """Angles ``(..., blocks, pairs)`` whose Q have norms of at most ``eps`` / sqrt(blocks)."""
        if not self.coft:
            return angles
        radius = self.eps / angles.shape[-2] ** 0.5
        norm = jnp.sqrt(2 * jnp.sum(angles**2, axis=-1, keepdims=True))  # each angle is in Q twice
        return jnp.where(norm <= radius, angles, angles * (radius / jnp.maximum(norm, radius)))

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``R W``, or ``W R`` for an embedding, in the adapter's precision."""
        rotation = self._rotation(params, state)
        rotated = matrix.astype(rotation.dtype)
        if "oft_R" in params:
            rotated = _rotate(rotated.T, jnp.swapaxes(rotation, -1, -2)).T
        else:
            rotated = _rotate(rotated, rotation)
        return rotated.astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``(x R) W``; what is no plain product or lookup needs the merged matrix."""
        if type(product) is Product and "oft_R" in params:
            rotation = self._rotation(params, state)
            return base.apply(_rotate(x.astype(rotation.dtype), rotation).astype(x.dtype), product)
        if isinstance(product, Lookup) and "oft_embedding_R" in params:
            y, rotation = base.apply(x, product), self._rotation(params, state)
            return _rotate(y.astype(rotation.dtype), rotation).astype(y.dtype)
        return apply_merged(self, params, state, base, x, product)

    def _rotation(self, params: Arrays, state: Arrays) -> Float[Array, "blocks size size"]:
        """``(blocks, block, block)``, the identity for layers that are not adapted and blocks that are dropped."""
        (given,) = params.values()
        angles, blocks = self._in_ball(given), len(given)
        if self.coft:  # PEFT puts the angles there before it uses them, so that the gradient is that of those
            angles = jax.lax.stop_gradient(angles) + (given - jax.lax.stop_gradient(given))
        if "dropout" in state and blocks > 1:
            order = jax.random.permutation(state["dropout"]["key"], blocks)
            angles = jnp.where((order < int(self.module_dropout * blocks))[:, None], 0, angles)
        turns = skew(jnp.where(state["hit"][..., None, None], angles, 0))
        if not self.use_cayley_neumann:
            return cayley(-turns).astype(turns.dtype)
        return cayley_series(turns, self.num_cayley_neumann_terms)


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of ``size`` that PEFT takes for the ``wanted`` one: the nearest, the smaller of two.

    Example:
        >>> nearest_divisor(96, 32), nearest_divisor(40, 32), nearest_divisor(8, 32)
        (32, 40, 8)
    """
    if wanted >= size:
        return size
    above = next(n for n in range(wanted, size + 1) if size % n == 0)
    below = next(n for n in range(wanted, 0, -1) if size % n == 0)
    return below if wanted - below <= above - wanted else above


def _rotate(
    x: Float[Array, "*rows features"], rotation: Float[Array, "blocks size size"]
) -> Float[Array, "*rows features"]:
    """``x R`` for each block of the last axis; one shared block serves all."""
    block = rotation.shape[-1]
    split = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    rotation = jnp.broadcast_to(rotation, (split.shape[-2], block, block))
    return jnp.einsum("...bi,bij->...bj", split, rotation).reshape(x.shape)
