"""GraLoRA: W' = W + s D, where D is a grid of k times k blocks, each with low-rank factors of its own.

Jung et al., 2025, https://arxiv.org/abs/2505.20355; "hybrid" adds one LoRA of the whole matrix. Numbers
follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank, kaiming
from peft_jax.methods.target_fields import LayerFields, TargetFields

A, B = "gralora_A", "gralora_B"
GENERAL_A, GENERAL_B = "gralora_A_general", "gralora_B_general"


@register("GRALORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GraloraConfig(TargetFields, LayerFields, FactoredChange):
    """Adds a low-rank matrix to each block of a grid; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Rank of the change; a block has rank ``r / gralora_k``, and their number a multiple of it.
        hybrid_r: Rank of a LoRA of the whole matrix beside the blocks; 0 for none.
        alpha: Numerator of the scale ``alpha / (r + hybrid_r)``.
        gralora_dropout: Probability of zeroing an input of the change in training, in [0, 1).
        gralora_k: Blocks along the inputs and along the outputs, a divisor of ``r`` and of inputs and outputs.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"gralora_only"`` (those of adapted modules).
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, GraloraConfig(r=4, gralora_k=2, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'gralora_A': (2, 4, 4), 'gralora_B': (2, 4, 3)}
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        A: ("blocks", "part", "rank"),
        B: ("blocks", "rank", "part"),
        GENERAL_A: ("in", "rank"),
        GENERAL_B: ("rank", "out"),
    }

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "gralora_dropout")
        if self.hybrid_r < 0:
            raise ValueError(f"hybrid_r is at least 0, got {self.hybrid_r}.")
        if self.gralora_k < 1 or self.r % self.gralora_k:
            raise ValueError(f"gralora_k is a divisor of r={self.r}, got {self.gralora_k}.")

    @property
    def dropout_rate(self) -> float:
        """``gralora_dropout``."""
        return self.gralora_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The blocks' factors by block of inputs and of outputs, and those of the whole matrix."""
        k = self.gralora_k
        if n_in % k or n_out % k:
            raise ValueError(
                f"GraloraConfig(gralora_k={k}) needs a divisor of the {n_in} inputs and {n_out} outputs of '{module}'."
            )
        shapes: dict[str, tuple[int, ...]] = {A: (k, n_in // k, self.r), B: (k, self.r, n_out // k)}
        if self.hybrid_r:
            shapes |= {GENERAL_A: (n_in, self.hybrid_r), GENERAL_B: (self.hybrid_r, n_out)}
        return shapes

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random first factors; second ones of zeros, or random."""
        is_second = role in (B, GENERAL_B)
        return jnp.zeros(shape) if is_second and self.init_weights else kaiming(key, shape, shape[-2])

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale of each stacked layer, 0 where it is not adapted."""
        scale = self.alpha / (self.r + self.hybrid_r)
        return {"hit": jnp.asarray(adapted), "scaling": jnp.asarray(np.where(adapted, scale, 0), jnp.float32)}

    def factors(
        self, params: Arrays, state: Arrays, n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """The blocks' factors as those of one matrix of ``k r`` ranks, most of whose elements are zero.

        A rank is of one block, of outputs o and inputs i: the first factor is zero but for its inputs, and the
        second one but for its outputs.
        """
        a, b = params[A], params[B]
        k = a.shape[-3]
        rank = a.shape[-1]
        groups = a.shape[:-3]
        same = jnp.eye(k, dtype=a.dtype)
        of_inputs = a.reshape(*groups, k, n_in // k, k, rank // k)  # i, input, o, rank
        of_outputs = b.reshape(*groups, k, k, rank // k, n_out // k)  # o, i, rank, output
        first = jnp.einsum("...inor,ij->...inojr", of_inputs, same).reshape(*groups, n_in, k * rank)
        second = jnp.einsum("...oirm,op->...oirpm", of_outputs, same).reshape(*groups, k * rank, n_out)
        if GENERAL_A in params:
            first = jnp.concatenate([first, params[GENERAL_A]], axis=-1)
            second = jnp.concatenate([second, params[GENERAL_B]], axis=-2)
        return first, state["scaling"][..., None, None].astype(a.dtype) * second
