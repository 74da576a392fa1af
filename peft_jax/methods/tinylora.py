"""TinyLoRA: W' = W + A R B, with frozen factors from the singular vectors of W, and R = sum_i v_i P_i.

Learning to Reason in 13 Parameters, 2026, https://arxiv.org/abs/2602.04118: the P_i are frozen random matrices, and the
vector v is all that is trained; several modules may have one v together. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.shared_arrays import TrainedSharedArrays
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import LayerFields, TargetFields
from peft_jax.methods.torch_draws import normal, seeded

VECTORS, GROUP = "tinylora_v", "group"
FIRST, SECOND, RANDOM = "tinylora_A", "tinylora_B", "tinylora_P"
UNIFORM = "uniform"


@register("TINYLORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(TargetFields, LayerFields, TrainedSharedArrays, StartsFromWeight, FrozenArrays, FactoredChange):
    """Trains one short vector a module, or one for several modules; fields and defaults are PEFT's.

    Files number the modules in the order in which PyTorch declares them. In a bare tree they are sorted by name. In a
    tree the first leaf trains the vectors of all modules, and the others take theirs from there.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Number of singular values, at least 1; a smaller module has those that it has.
        u: Elements of a vector, at least 1.
        weight_tying: How much the modules share vectors, from 0.0, one each, to 1.0, one for all.
        projection_seed: Seed of the random matrices, which are those that PyTorch draws from it.
        save_projection: Whether files hold the random matrices; without them they are drawn again from the seed, where
            their last digits may differ from PyTorch's.
        init_v_bound: Bound of random vectors.
        tinylora_dropout: Probability of zeroing an input of the change in training, in [0, 1), and of an embedding what
            the first factor gives.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"tinylora_only"`` (those of adapted modules).
        init_weights: True starts at no change, ``"uniform"`` at uniform numbers within ``init_v_bound``. False does so
            too, where PEFT leaves the vectors as the memory was.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 4))}, "v": {"kernel": jnp.ones((8, 4))}}
        >>> params = pj.apply_adapter(params, TinyLoraConfig(u=3, target_modules=["q", "v"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'tinylora_v': (2, 3)}
        >>> params["v"]["kernel"].params, params["v"]["kernel"].state["tinylora_A"].shape
        ({}, (8, 2))
    """

    learning_rate: ClassVar[float] = 4e-3
    carried: ClassVar[tuple[str, ...]] = (VECTORS,)
    counts_modules: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        FIRST: ("in", "rank"),
        SECOND: ("rank", "out"),
        RANDOM: ("elements", "row", "column"),
    }
    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {VECTORS: ("groups", "elements")}

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "tinylora_dropout")
        if self.u < 1:
            raise ValueError(f"u is the number of elements of a vector, at least 1, got {self.u}.")
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"weight_tying is from 0 to 1, got {self.weight_tying}.")
        if isinstance(self.init_weights, str) and self.init_weights != UNIFORM:
            raise ValueError(f"init_weights is True, False or '{UNIFORM}', got {self.init_weights!r}.")

    @property
    def dropout_rate(self) -> float:
        """``tinylora_dropout``."""
        return self.tinylora_dropout

    @property
    def frozen(self) -> tuple[str, ...]:
        """The factors, and the random matrices if files have them."""
        return (FIRST, SECOND, RANDOM) if self.save_projection else (FIRST, SECOND)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Those of the frozen arrays of a file; nothing is trained in a layer of its own."""
        rank = min(self.r, n_in, n_out)
        shapes = {FIRST: (n_in, rank), SECOND: (rank, n_out), RANDOM: (self.u, rank, rank)}
        return {role: shapes[role] for role in self.frozen}

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """The factors of the base without other adapters; `carry` and `numbered` have the rest."""
        matrix = base.layout.matrix(base.unadapted.dense()).astype(jnp.float32)
        n_in, n_out = matrix.shape[-2:]
        rank = min(self.r, n_in, n_out)
        layers = []
        for layer, hit in zip(matrix.reshape(-1, n_in, n_out), adapted.flat, strict=True):
            inputs, values, outputs = jnp.linalg.svd(layer if hit else jnp.zeros_like(layer), full_matrices=False)
            root = jnp.sqrt(values[:rank])
            layers.append((inputs[:, :rank] * root[None], root[:, None] * outputs[:rank]))
        first, second = (jnp.stack(factors) for factors in zip(*layers, strict=True))
        state = self.state(names, adapted)
        state[FIRST] = first.reshape(*names.shape, n_in, rank)
        state[SECOND] = second.reshape(*names.shape, rank, n_out)
        return {}, state, base

    def groups(self, modules: int) -> np.ndarray:
        """The number of the vector of each of so many modules."""
        count = max(1, round(modules * (1.0 - self.weight_tying)))
        return np.minimum(np.arange(modules) // max(1, modules // count), count - 1)

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The vectors."""
        return {VECTORS: (int(self.groups(len(sizes)).max()) + 1, self.u)}

    def initial(self, sizes: Mapping[str, tuple[int, int]], key: jax.Array) -> dict[str, jax.Array]:
        """Vectors of zeros, or of uniform numbers."""
        shape = self.shared_shapes(list(sizes.values()))[VECTORS]
        if self.init_weights is True:
            return {VECTORS: jnp.zeros(shape)}
        return {VECTORS: self.init_v_bound * jax.random.uniform(key, shape, minval=-1.0)}

    def numbered(
        self, sizes: Mapping[str, tuple[int, int]], names: np.ndarray, adapted: np.ndarray, *, lookup: bool
    ) -> dict[str, jax.Array]:
        """The vector of each layer by number, and its random matrices."""
        numbers = {name: number for number, name in enumerate(sizes)}
        groups = self.groups(len(sizes))
        rank = min(self.r, *sizes[str(names[adapted].flat[0])])
        own = np.zeros(names.shape, np.int32)
        random = np.zeros((*names.shape, self.u, rank, rank), np.float32)
        for index in zip(*np.nonzero(adapted), strict=True) if adapted.ndim else [()]:
            number = numbers[str(names[index])]
            own[index] = groups[number]
            drawn = normal(seeded(self.projection_seed + number), self.u * rank * rank) / np.float32(rank**0.5)
            drawn = drawn.reshape(self.u, rank, rank)
            random[index] = drawn if lookup else np.swapaxes(drawn, -1, -2)
        return {GROUP: jnp.asarray(own), RANDOM: jnp.asarray(random)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The elements of all vectors in the first leaf's first layer."""
        sizes = np.zeros(np.shape(state["hit"]), int)
        if VECTORS in params:
            sizes[(0,) * sizes.ndim] = int(np.prod(params[VECTORS].shape[-2:]))
        return sizes

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """``A`` and ``R B``."""
        vectors = self.all_layers(params, state, VECTORS)
        own = jnp.take_along_axis(vectors, state[GROUP][..., None, None], axis=-2)[..., 0, :]
        own = jnp.where(state["hit"][..., None], own, 0)
        middle = jnp.einsum("...i,...ijk->...jk", own, state[RANDOM].astype(own.dtype))
        return state[FIRST].astype(own.dtype), middle @ state[SECOND].astype(own.dtype)

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (dropout(x) A) (R B)``; a lookup drops of the rows of ``A``, as in PEFT."""
        if not product.looks_up:
            return super().apply(params, state, base, x, product)
        a, b = self.factors(params, state, *base.layout.sizes(base.shape))
        update = product.up(dropout(product.down(x, a), state), b)
        return product.added(base.apply(x, product), update)
