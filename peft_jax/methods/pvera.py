"""PVeRA: VeRA whose values between its two matrices are drawn, in training, from normal distributions of the inputs.

https://arxiv.org/abs/2512.07703: h = W x + diag(b) B z, where z is normal. The two halves of diag(d) A x are its mean
and the logarithm of its variance. Outside of training z is its mean. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank, unsupported
from peft_jax.methods.random_factors import RandomFactors
from peft_jax.methods.target_fields import LayerFields, TargetFields

INNER, OUTER = "pvera_lambda_d", "pvera_lambda_b"
FIRST, SECOND = "pvera_A", "pvera_B"


@register("PVERA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PveraConfig(TargetFields, LayerFields, RandomFactors, FactoredChange):
    """Trains two vectors a layer between random matrices, with noise between them; fields and defaults are PEFT's.

    The matrices are shared by all layers, as VeRA's are. With `peft_jax.with_dropout`, as training has it, the values
    between the matrices are drawn; without it they are their means.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Number of values between the matrices, at least 1.
        projection_prng_key: Seed of the random matrices, which are those that PyTorch draws from it.
        save_projection: Whether files hold the random matrices; without them they are drawn again from the seed.
        pvera_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        d_initial: Start of the vector between the matrices.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"pvera_lambda_only"`` (those of adapted modules).
        init_weights: True starts at no change; False at a random vector between the matrices and ones behind them.

    Every other field of PEFT's ``PveraConfig`` is known, and refused away from its default: noise outside of training,
    and a generator of its own.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, PveraConfig(r=4, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'pvera_lambda_d': (8,), 'pvera_lambda_b': (3,)}
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {INNER: ("rank",), OUTER: ("out",)}
    bias_only: ClassVar[str] = "pvera_lambda_only"

    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {FIRST: ("in", "rank"), SECOND: ("rank", "out")}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sample_at_inference: bool = unsupported(False)
    generator_seed: int | None = unsupported(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "pvera_dropout")

    @property
    def width(self) -> int:
        """The means and the logarithms of the variances."""
        return 2 * self.r

    @property
    def dropout_rate(self) -> float:
        """``pvera_dropout``."""
        return self.pvera_dropout

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """That of inputs, and that there is noise."""
        return {"rate": self.pvera_dropout, "noise": 1.0}

    def factors(
        self, params: Arrays, state: Arrays, n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """Those of the means."""
        first, second = self._both(params, state)
        return first[..., : second.shape[-2]], second

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + z B diag(b)``; an embedding has no noise, as it has no dropout."""
        if "dropout" not in state or product.looks_up:
            return super().apply(params, state, base, x, product)
        first, second = self._both(params, state)
        dropped, noise = jax.random.split(jnp.reshape(state["dropout"]["key"], -1)[0])
        given = x
        if "rate" in state["dropout"]:
            given = dropout(x, {"dropout": {**state["dropout"], "key": dropped}})
        mean, log_variance = jnp.split(product.down(given, first), 2, axis=-1)
        drawn = mean + jax.random.normal(noise, mean.shape, mean.dtype) * jnp.exp(0.5 * log_variance)
        y, update = base.apply(x, product), product.up(drawn, second)
        return product.added(y, update)

    def _both(
        self, params: Arrays, state: Mapping[str, Any]
    ) -> tuple[Float[Array, "*groups in both"], Float[Array, "*groups rank out"]]:
        """``A diag(d)`` of means and variances, and ``B diag(b)``, zero for layers that are not adapted."""
        inner = params[INNER]
        outer = jnp.where(state["hit"][..., None], params[OUTER], 0)
        first = state[FIRST].astype(inner.dtype) * inner[..., None, :]
        return first, state[SECOND].astype(outer.dtype) * outer[..., None, :]
