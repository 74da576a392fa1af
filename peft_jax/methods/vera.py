"""VeRA: W' = W + A diag(d) B diag(b), with random matrices A and B that are frozen and shared by all layers.

Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454, equation 2. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability, check_rank
from peft_jax.methods.random_factors import RandomFactors
from peft_jax.methods.target_fields import LayerFields, TargetFields


@register("VERA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(TargetFields, LayerFields, RandomFactors, Method):
    """Trains two vectors a layer between random matrices; fields and defaults are PEFT's.

    The matrices are as large as the largest adapted layer asks for, and each layer takes its part from their
    beginning. In a file they stand once; in a tree each leaf has its part, once for each of its stacked layers.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Rank of the random matrices, at least 1.
        projection_prng_key: Seed of the random matrices, which are those that PyTorch draws from it.
        save_projection: Whether files hold the random matrices; without them they are drawn again from the seed.
        vera_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        d_initial: Start of the vector between the matrices.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"vera_only"`` (those of adapted modules).
        init_weights: True starts at no change; False at a random vector between the matrices and ones behind them.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, VeraConfig(r=4, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'vera_lambda_d': (4,), 'vera_lambda_b': (3,)}
        >>> params["q"]["kernel"].state["vera_A"].shape
        (8, 4)
    """

    learning_rate: ClassVar[float] = 4e-3
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"vera_lambda_d": ("rank",), "vera_lambda_b": ("out",)}

    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"vera_A": ("in", "rank"), "vera_B": ("rank", "out")}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "vera_dropout")

    @property
    def dropout_rate(self) -> float:
        """``vera_dropout``."""
        return self.vera_dropout

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + A diag(d) B diag(b)``, added in the adapter's precision."""
        d, b = params["vera_lambda_d"], _outer(params, state)
        random_a, random_b = _random(params, state)
        change = ((random_a * d[None]) @ random_b) * b[None]
        return (matrix.astype(d.dtype) + change).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + b ((d (dropout(x) A)) B)``; the low-rank path runs in the adapter's precision."""
        y, (random_a, random_b) = base.apply(x, product), _random(params, state)
        inner = product.down(x if product.looks_up else dropout(x, state), random_a)
        inner = product.scale(inner, params["vera_lambda_d"])
        update = product.scale(product.up(inner, random_b), _outer(params, state))
        return product.added(y, update)


def _random(params: Arrays, state: Arrays) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """The random matrices in the precision of the vectors."""
    kind = params["vera_lambda_d"].dtype
    return state["vera_A"].astype(kind), state["vera_B"].astype(kind)


def _outer(params: Arrays, state: Arrays) -> Float[Array, "*groups out"]:
    """The vector behind the matrices, zero for layers that are not adapted."""
    return jnp.where(state["hit"][..., None], params["vera_lambda_b"], 0)
