"""RandLoRA: W' = W + s Σ_j B_j diag(λ_j) A diag(γ_j), with as many random B_j and A as give a change of full rank.

Albert et al., 2025, https://arxiv.org/abs/2502.00987: the random matrices are frozen and shared by all layers, and the
diagonal ones are trained. Numbers follow PEFT 0.21.2, in which the columns of the B_j, counted base by base, meet the
rows of the scaled A counted rank by rank.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.layout import Layout
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank
from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.target_fields import LayerFields, TargetFields
from peft_jax.methods.torch_draws import seeded, uniform, uniform_within

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
A, B = "randlora_A", "randlora_B"


@register("RANDLORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(TargetFields, LayerFields, SharedArrays, FactoredChange):
    """Adds a sum of random matrices with trained scales, of full rank; fields and defaults are PEFT's.

    The random matrices are as large as all adapted layers together ask for. Each leaf has them whole, once for each of
    its stacked layers, as PEFT's file has them once for each layer.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Rank of one random matrix, at least 1. The smaller it is, the more of them there are.
        projection_prng_key: Seed of the random matrices, which are those that PyTorch draws from it.
        save_projection: Whether files hold the random matrices; without them they are drawn again from the seed.
        sparse: Whether the random numbers are -1, 0 and 1, where 0 is drawn of two in three.
        very_sparse: Whether they are, and 0 is drawn of all but one in the root of the smaller size.
        randlora_dropout: Probability of zeroing an input of the change in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        randlora_alpha: Numerator of the scale ``randlora_alpha / r``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"randlora_only"`` (those of adapted modules).
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, RandLoraConfig(r=2, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'randlora_lambda': (2, 3), 'randlora_gamma': (3, 6)}
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {LAMBDA: ("rank", "bases"), GAMMA: ("bases", "least")}
    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {A: ("rank", "least"), B: ("most", "bases", "rank")}

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    randlora_alpha: int = 640
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "randlora_dropout")

    @property
    def saves_shared(self) -> bool:
        """``save_projection``."""
        return self.save_projection

    @property
    def dropout_rate(self) -> float:
        """``randlora_dropout``."""
        return self.randlora_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The scales of ranks of each base, and of the smaller one of a module's sizes."""
        least = min(n_in, n_out)
        bases = math.ceil(least / self.r)
        return {LAMBDA: (self.r, bases), GAMMA: (bases, least)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros and a small constant; or random numbers and ones, which `init` makes small."""
        if role == LAMBDA:
            return jnp.zeros(shape) if self.init_weights else jax.random.normal(key, shape)
        return jnp.full(shape, 1 / max(shape)) if self.init_weights else jnp.ones(shape)

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As every method's; scales that do not start at no change are by the larger one of the module's sizes."""
        params, state = super().init(layout, shape, names, adapted, key)
        if not self.init_weights:
            params[GAMMA] = params[GAMMA] / max(layout.sizes(shape))
        return params, state

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale of each stacked layer, 0 where it is not adapted."""
        scale = np.where(adapted, self.randlora_alpha / self.r, 0)
        return {"hit": jnp.asarray(adapted), "scaling": jnp.asarray(scale, jnp.float32)}

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """One matrix of the smaller size, and as many of the larger size as give full rank."""
        least, most = sorted(np.max(sizes, axis=0).tolist())
        return {A: (self.r, least), B: (most, math.ceil(least / self.r), self.r)}

    def shared(self, sizes: Sequence[tuple[int, int]]) -> dict[str, jax.Array]:
        """Drawn as PyTorch draws them from ``projection_prng_key``, in bfloat16 if they are not sparse."""
        generator = seeded(self.projection_prng_key)
        shapes = self.shared_shapes(sizes)
        if self.sparse or self.very_sparse:
            sparsity = math.sqrt(shapes[A][1]) if self.very_sparse else 3
            drawn = {role: ternary(uniform(generator, shape), sparsity) for role, shape in shapes.items()}
            return {role: jnp.asarray(array / _deviation(array)) for role, array in drawn.items()}
        most, bases, rank = shapes[B]
        _, least = shapes[A]
        first = _kaiming(generator, (rank, least))
        second = np.stack([_kaiming(generator, (most, rank)) for _ in range(bases)], axis=1)
        return {A: jnp.asarray(_normalized(first)), B: jnp.asarray(_normalized(second))}

    def share(self, shared: Mapping[str, Any], sizes: tuple[int, int], stack: tuple[int, ...]) -> dict[str, jax.Array]:
        """The random matrices, for each stacked layer."""
        arrays = {role: jnp.asarray(array) for role, array in shared.items()}
        return {role: jnp.broadcast_to(array, (*stack, *array.shape)) for role, array in arrays.items()}

    def factors(
        self, params: Arrays, state: Arrays, n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """The scaled A on the side of the smaller size, and the B beside each other on that of the larger one."""
        scales, gamma = params[LAMBDA], params[GAMMA]
        bases, least = gamma.shape[-2:]
        groups = gamma.shape[:-2]
        a = state[A][..., None, :least].astype(gamma.dtype)
        b = state[B][..., : max(n_in, n_out), :bases, :].astype(gamma.dtype)
        scaled = (scales[..., None] * a * gamma[..., None, :, :]).reshape(*groups, -1, least)  # rank by rank
        beside = b.reshape(*groups, max(n_in, n_out), -1)  # base by base
        scaled = state["scaling"][..., None, None].astype(gamma.dtype) * scaled
        if least == n_in:
            return jnp.swapaxes(scaled, -1, -2), jnp.swapaxes(beside, -1, -2)
        return beside, scaled


def ternary(drawn: np.ndarray, sparsity: float) -> np.ndarray:
    """-1 where numbers of [0, 1) are low, 1 where they are high, and 0 where they are neither; float32.

    Example:
        >>> ternary(np.array([0.1, 0.5, 0.9]), 3).tolist()
        [-1.0, 0.0, 1.0]
    """
    return (drawn > 1 - 1 / (2 * sparsity)).astype(np.float32) - (drawn < 1 / (2 * sparsity)).astype(np.float32)


def _kaiming(generator: np.random.RandomState, shape: tuple[int, int]) -> np.ndarray:
    """``kaiming_uniform_(a=sqrt(5))`` of a bfloat16 array with an axis of length 1 between the two.

    The upper bound is not among the numbers: what is rounded to it becomes the lower one.
    """
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + 5)) / math.sqrt(shape[1]))
    drawn, limit = _halved(uniform_within(generator, shape, bound)), _halved(np.float32(bound))
    return np.where(drawn == limit, -limit, drawn)


def _deviation(array: np.ndarray) -> np.ndarray:
    """The standard deviation, as PyTorch has it."""
    return np.asarray(np.std(array, ddof=1, dtype=np.float64), np.float32)


def _normalized(array: np.ndarray) -> np.ndarray:
    """A bfloat16 array divided by its standard deviation, each of which is rounded."""
    return _halved(array / _halved(_deviation(array)))


def _halved(array: np.ndarray | np.floating) -> np.ndarray:
    """Float32 numbers rounded to bfloat16."""
    return np.asarray(np.asarray(array).astype(jnp.bfloat16), np.float32)
