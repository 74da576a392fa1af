"""BOFT: W' = diag(s) R W with R a product of butterfly factors, each a permuted block-diagonal rotation of the inputs.

Liu et al., 2023, https://arxiv.org/abs/2311.06243, section 4. Numbers follow PEFT 0.21.2 with its CUDA extension;
without it PEFT has one factor whatever its config says.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability
from peft_jax.methods.rotations import cayley
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields


@register("BOFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFTConfig(TargetFields, ExcludeFields, LayerFields, Method):
    """Rotates the inputs of a frozen matrix by butterfly factors, and scales its outputs; fields are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        boft_block_size: Size of the blocks, a divisor of the layer's inputs; 0 to give their number instead.
        boft_block_num: Number of blocks; 0 to give their size instead.
        boft_n_butterfly_factor: Number of factors, at least 1. With several the blocks' size and number are even, and
            the inputs are a multiple of the block size times two for each further factor.
        boft_dropout: In training, the share of blocks of one factor, chosen at random, that do not rotate.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"boft_only"`` (those of adapted modules).
        init_weights: True starts at no rotation and no scale; False at random ones.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> config = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["q"])
        >>> params = pj.apply_adapter(params, config)
        >>> params["q"]["kernel"].params["boft_R"].shape  # two factors of four blocks
        (2, 4, 2, 2)
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "boft_R": ("factors", "blocks", "row", "column"),
        "boft_s": ("out",),
    }

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "boft_dropout")
        sizes = self.boft_block_size, self.boft_block_num
        if min(sizes) < 0 or (sizes[0] == 0) == (sizes[1] == 0):
            raise ValueError(
                f"BOFT takes the size of blocks or their number, got boft_block_size={sizes[0]} and boft_block_num="
                f"{sizes[1]}. Set one of them to 0 and the other above."
            )
        if self.boft_n_butterfly_factor < 1:
            raise ValueError(f"boft_n_butterfly_factor is at least 1, got {self.boft_n_butterfly_factor}.")

    @property
    def dropout_rate(self) -> float:
        """``boft_dropout``."""
        return self.boft_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The blocks of each factor, whose skew-symmetric parts turn, and a scale for each output."""
        wanted = self.boft_block_size or self.boft_block_num
        size = self.boft_block_size or n_in // wanted
        factors, blocks = self.boft_n_butterfly_factor, n_in // max(size, 1)
        is_even = factors == 1 or size % 2 == 0 and blocks % 2 ** (factors - 1) == 0
        if n_in % wanted or not is_even:
            name = "boft_block_size" if self.boft_block_size else "boft_block_num"
            rule = f", of blocks of even size whose number {2 ** (factors - 1)} divides" if factors > 1 else ""
            raise ValueError(
                f"BOFTConfig({name}={wanted}, boft_n_butterfly_factor={factors}) needs a divisor of the {n_in} inputs "
                f"of '{module}'{rule}."
            )
        return {"boft_R": (factors, blocks, size, size), "boft_s": (n_out,)}

    def of_file(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """With one factor where the file has one: without its CUDA extension PEFT makes one, whatever the config says.

        Raises:
            ValueError: if the file has another number of factors than the config.
        """
        factors = {shape[0] for key, shape in shapes.items() if key.endswith(".boft_R") and shape}
        if factors == {1}:
            return self.replace(boft_n_butterfly_factor=1)
        if factors - {self.boft_n_butterfly_factor}:
            found = " and ".join(map(str, sorted(factors)))
            raise ValueError(
                f"The file holds BOFT modules of {found} butterfly factors, and its config says "
                f"boft_n_butterfly_factor={self.boft_n_butterfly_factor}. Write the number that it was trained with."
            )
        return self

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """No rotation and a scale of one, or random ones near them."""
        noise = 0.0 if self.init_weights else 0.1 * jax.random.normal(key, shape)
        return jnp.full(shape, 1.0 if role == "boft_s" else 0.0) + noise

    def merge(self, params: Arrays, state: Arrays, matrix: jax.Array) -> jax.Array:
        """``diag(s) R W``, in the adapter's precision."""
        scale, inverse = self._scale(params, state), jnp.swapaxes(self._rotations(params, state), -1, -2)
        rotated = _rotate(matrix.T.astype(scale.dtype), inverse, range(len(inverse))).T
        return (rotated * scale[None]).astype(matrix.dtype)

    def apply(self, params: Arrays, state: Arrays, base: Weight, x: jax.Array, product: Product) -> jax.Array:
        """``s ((x R) W)``; what is no plain product needs the merged matrix."""
        if type(product) is not Product:
            return apply_merged(self, params, state, base, x, product)
        scale, rotations = self._scale(params, state), self._rotations(params, state)
        rotated = _rotate(x.astype(scale.dtype), rotations, range(len(rotations))[::-1])
        y = base.apply(rotated.astype(x.dtype), product)
        return product.scale(y, scale)

    def _scale(self, params: Arrays, state: Arrays) -> jax.Array:
        return jnp.where(state["hit"], params["boft_s"], 1)

    def _rotations(self, params: Arrays, state: Arrays) -> jax.Array:
        """``(factors, blocks, size, size)`` by Cayley's map, the identity for layers that are not adapted."""
        blocks = jnp.where(state["hit"], params["boft_R"], 0).astype(jnp.float32)  # in which equations are solved
        turns = 0.5 * (blocks - jnp.swapaxes(blocks, -1, -2))
        rotations = jnp.swapaxes(cayley(turns), -1, -2).astype(params["boft_R"].dtype)  # PEFT's turn the other way
        if "dropout" not in state:
            return rotations
        factors, number = rotations.shape[:2]
        factor, order = jax.random.split(jnp.reshape(state["dropout"]["key"], -1)[0])
        is_still = jax.random.permutation(order, number) < int(self.boft_dropout * number)
        is_chosen = jnp.arange(factors) == jax.random.randint(factor, (), 0, factors)
        still = is_chosen[:, None, None, None] & is_still[None, :, None, None]
        return jnp.where(still, jnp.eye(rotations.shape[-1], dtype=rotations.dtype), rotations)


def _rotate(x: jax.Array, rotations: jax.Array, levels: Sequence[int]) -> jax.Array:
    """The last axis of ``x`` times one factor after the other, in the order of ``levels``."""
    factors, blocks, size, _ = rotations.shape
    for level in levels:
        order = butterfly(blocks, size, level) if factors > 1 else np.arange(blocks * size)
        split = x[..., np.argsort(order)].reshape(*x.shape[:-1], blocks, size)
        x = jnp.einsum("...bi,bij->...bj", split, rotations[level]).reshape(x.shape)[..., order]
    return x


def butterfly(blocks: int, size: int, level: int) -> np.ndarray:
    """The order of the inputs before a factor's blocks: within groups of ``2**level`` blocks, halves of blocks sorted.

    Those at even places come first, then those at odd ones.

    Example:
        >>> butterfly(blocks=4, size=2, level=1).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = np.arange(2 * blocks).reshape(-1, 2 * 2**level)
    order = np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).ravel()
    return np.asarray(np.arange(blocks * size).reshape(2 * blocks, size // 2)[order].ravel())
