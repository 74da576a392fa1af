"""PVeRA: VeRA whose values between its two matrices are drawn, in training, from normal distributions of the inputs.

https://arxiv.org/abs/2512.07703: h = W x + diag(b) B z, where z is normal. The two halves of diag(d) A x are its mean
and the logarithm of its variance. Outside of training z is its mean. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank, unsupported
from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.target_fields import LayerFields, TargetFields
from peft_jax.methods.torch_draws import kaiming_uniform, seeded

INNER, OUTER = "pvera_lambda_d", "pvera_lambda_b"
FIRST, SECOND = "pvera_A", "pvera_B"


@register("PVERA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PveraConfig(TargetFields, LayerFields, SharedArrays, FactoredChange):
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
    def saves_shared(self) -> bool:
        """``save_projection``."""
        return self.save_projection

    @property
    def dropout_rate(self) -> float:
        """``pvera_dropout``."""
        return self.pvera_dropout

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """That of inputs, and that there is noise."""
        return {"rate": self.pvera_dropout, "noise": 1.0}

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The two vectors; the first one is of means and variances."""
        return {INNER: (2 * self.r,), OUTER: (n_out,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """A small constant, and zeros; or random numbers, and ones."""
        if role == INNER:
            return jnp.full(shape, self.d_initial) if self.init_weights else jax.random.normal(key, shape)
        return jnp.zeros(shape) if self.init_weights else jnp.ones(shape)

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The random matrices, as large as the largest layer."""
        n_in, n_out = np.max(sizes, axis=0).tolist()
        return {FIRST: (n_in, 2 * self.r), SECOND: (self.r, n_out)}

    def shared(self, sizes: Sequence[tuple[int, int]]) -> dict[str, jax.Array]:
        """Drawn as PyTorch's ``kaiming_uniform_`` draws them one after the other, from ``projection_prng_key``."""
        generator = seeded(self.projection_prng_key)
        shapes = self.shared_shapes(sizes)
        return {
            role: jnp.asarray(kaiming_uniform(generator, (out, fan_in)).T) for role, (fan_in, out) in shapes.items()
        }

    def share(self, shared: Mapping[str, Any], sizes: tuple[int, int], stack: tuple[int, ...]) -> dict[str, jax.Array]:
        """The beginnings of the random matrices, for each stacked layer."""
        parts = {FIRST: shared[FIRST][: sizes[0]], SECOND: shared[SECOND][:, : sizes[1]]}
        return {role: jnp.broadcast_to(jnp.asarray(part), (*stack, *part.shape)) for role, part in parts.items()}

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
        if self.pvera_dropout:
            keep = 1 - self.pvera_dropout
            given = jnp.where(jax.random.bernoulli(dropped, keep, x.shape), x / keep, 0).astype(x.dtype)
        else:
            given = x
        mean, log_variance = jnp.split(product.down(given, first), 2, axis=-1)
        drawn = mean + jax.random.normal(noise, mean.shape, mean.dtype) * jnp.exp(0.5 * log_variance)
        y, update = base.apply(x, product), product.up(drawn, second)
        return (y.astype(update.dtype) + update).astype(y.dtype)

    def _both(
        self, params: Arrays, state: Mapping[str, Any]
    ) -> tuple[Float[Array, "*groups in both"], Float[Array, "*groups rank out"]]:
        """``A diag(d)`` of means and variances, and ``B diag(b)``, zero for layers that are not adapted."""
        inner = params[INNER]
        outer = jnp.where(state["hit"][..., None], params[OUTER], 0)
        first = state[FIRST].astype(inner.dtype) * inner[..., None, :]
        return first, state[SECOND].astype(outer.dtype) * outer[..., None, :]
