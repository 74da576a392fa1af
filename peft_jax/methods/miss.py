"""MiSS: W' = W + D, where D repeats one block of rows M over all inputs: y = x W + (sum of x in blocks of r) M.

Kang and Yin, 2024, https://arxiv.org/abs/2409.15371, equation 4. Its variant "bat" adds W M + M blockwise instead.
Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.dropout import dropout
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability, check_rank, kaiming
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields


@register("MISS")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MissConfig(TargetFields, ExcludeFields, LayerFields, Method):
    """Adds one trained block of rows to every block of rows of a frozen matrix; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rows of the block, at least 1 and at most the layer's inputs.
        miss_dropout: Probability of zeroing an input of the change in training, in [0, 1); none for ``"bat"``.
        mini_r: Columns of the block for ``"mini"``, a divisor of the layer's outputs.
        init_weights: Which variant: True; False, which starts at random; ``"bat"``, whose blocks are square, one for
            each ``r`` outputs, and multiply the weight too; ``"mini"``, whose block is repeated over the outputs too.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"MiSS_only"`` (those of adapted modules).

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, MissConfig(r=2, target_modules=["q"]))
        >>> params["q"]["kernel"].params["miss_block"].shape
        (2, 6)
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "miss_block": ("rank", "out"),
        "miss_mini": ("rank", "part"),
        "miss_bat": ("blocks", "row", "column"),
    }
    bias_only: ClassVar[str] = "MiSS_only"

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "miss_dropout")
        if self.init_weights not in (True, False, "bat", "mini"):
            raise ValueError(f"init_weights is True, False, 'bat' or 'mini', got {self.init_weights!r}.")

    @property
    def dropout_rate(self) -> float:
        """``miss_dropout``, which "bat" has not."""
        return 0.0 if self.init_weights == "bat" else self.miss_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The block, or blocks."""
        if self.r > n_in:
            raise ValueError(f"MissConfig(r={self.r}) is above the {n_in} inputs of '{module}'. Choose a smaller r.")
        if self.init_weights == "bat":
            if n_in % self.r or n_out % self.r:
                raise ValueError(
                    f"MissConfig(r={self.r}, init_weights='bat') needs an r that divides the {n_in} inputs and {n_out} "
                    f"outputs of '{module}'."
                )
            return {"miss_bat": (n_out // self.r, self.r, self.r)}
        if self.init_weights == "mini":
            if n_out % self.mini_r:
                raise ValueError(
                    f"MissConfig(mini_r={self.mini_r}) needs a divisor of the {n_out} outputs of '{module}'."
                )
            return {"miss_mini": (self.r, self.mini_r)}
        return {"miss_block": (self.r, n_out)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros, unless a random start is asked for."""
        return jnp.zeros(shape) if self.init_weights else kaiming(key, shape, shape[1])

    def stacks_on(self, inner: Any) -> bool:
        """Those of one variant: PEFT's layer knows one."""
        return super().stacks_on(inner) and self._variant == inner._variant

    @property
    def _variant(self) -> str:
        return str(self.init_weights) if self.init_weights in ("bat", "mini") else "block"

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + D``, added in the adapter's precision."""
        n_in, n_out = matrix.shape
        if "miss_bat" in params:
            blocks = jnp.where(state["hit"], params["miss_bat"], 0)
            r = blocks.shape[-1]
            w = matrix.T.astype(blocks.dtype).reshape(n_out // r, r, n_in // r, r)  # PEFT's orientation
            # Block (b, i) of the weight becomes w + w m_b + m_b.
            change = jnp.einsum("bpiq,bqs->bpis", w, blocks) + blocks[:, :, None, :]
            return (w + change).reshape(n_out, n_in).T.astype(matrix.dtype)
        block = _block(params, state, n_out)
        change = jnp.tile(block, (-(-n_in // len(block)), 1))[:n_in]
        return (matrix.astype(block.dtype) + change).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (sum of dropout(x) in blocks) M``; "bat" needs the merged matrix."""
        if "miss_bat" in params:
            return apply_merged(self, params, state, base, x, product)
        y = base.apply(x, product)
        fold, block = self.factors(params, state, *base.layout.sizes(base.shape))
        update = product.up(product.down(x if product.looks_up else dropout(x, state), fold), block)
        return product.added(y, update)

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is the product of `factors`."""
        return self.init_weights != "bat"

    def factors(
        self, params: Arrays, state: Arrays, n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """Identities one above the other, which sum inputs in blocks, and the block; not those of "bat"."""
        block = _block(params, state, n_out)
        r = block.shape[-2]
        fold = jnp.tile(jnp.eye(r, dtype=block.dtype), (-(-n_in // r), 1))[:n_in]
        return jnp.broadcast_to(fold, (*block.shape[:-2], n_in, r)), block


def _block(params: Arrays, state: Arrays, n_out: int) -> Float[Array, "*groups rank {n_out}"]:
    """The rows ``(r, out)``, zero for layers that are not adapted."""
    (block,) = params.values()
    repeats = n_out // block.shape[-1]
    return jnp.where(state["hit"][..., None, None], jnp.tile(block, repeats), 0)
