"""Uni-LoRA: W' = W + A B, where each element of both factors is a scaled element of one trained vector.

Li et al., 2025, https://arxiv.org/abs/2506.00799: the elements of the factors of all layers are P t, where
each row of P has one element that is not zero, 1 over the square root of how often its column has one. So P keeps
lengths. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import functools
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
from peft_jax.methods.frozen_arrays import FrozenArrays, check_indices
from peft_jax.methods.shared_arrays import TrainedSharedArrays
from peft_jax.methods.target_fields import LayerFields, TargetFields

VECTOR = "unilora_theta_d"
FIRST, SECOND = "unilora_indices_A", "unilora_indices_B"
SCALES = {FIRST: "unilora_scales_A", SECOND: "unilora_scales_B"}


@register("UNILORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class UniLoraConfig(TargetFields, LayerFields, TrainedSharedArrays, FrozenArrays, FactoredChange):
    """Trains one vector, of whose elements the factors of all layers are made; fields and defaults are PEFT's.

    Which element is where is drawn from a seed over all modules in the order in which PyTorch declares them. In a
    bare tree they are sorted by name. In a tree the first leaf trains the vector, and the others take it from there.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Rank, at least 1.
        proj_seed: Seed of the places; they are those that NumPy draws for PEFT.
        theta_d_length: Number of elements of the vector, at least 1.
        unilora_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"unilora_only"`` (those of adapted modules).
        init_theta_d_bound: The vector starts within plus and minus this number. Such an adapter starts with a change.
        init_weights: False starts the vector at normal numbers instead.
        save_indices: Whether files hold the places and their scales; without them they are drawn again from the seed.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 4))}, "v": {"kernel": jnp.ones((8, 4))}}
        >>> params = pj.apply_adapter(params, UniLoraConfig(r=2, theta_d_length=16, target_modules=["q", "v"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'unilora_theta_d': (16,)}
        >>> params["v"]["kernel"].params, params["v"]["kernel"].state["unilora_indices_A"].shape
        ({}, (2, 8))
    """

    learning_rate: ClassVar[float] = 4e-3
    carried: ClassVar[tuple[str, ...]] = (VECTOR,)
    counts_modules: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        FIRST: ("rank", "in"),
        SECOND: ("out", "rank"),
        SCALES[FIRST]: ("rank", "in"),
        SCALES[SECOND]: ("out", "rank"),
    }
    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {VECTOR: ("elements",)}

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "unilora_dropout")
        if self.theta_d_length < 1:
            raise ValueError(f"theta_d_length is at least 1, got {self.theta_d_length}.")
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"init_theta_d_bound is a number above 0, got {self.init_theta_d_bound}.")
        if self.proj_seed < 0:
            raise ValueError(f"proj_seed is a whole number from 0 on, got {self.proj_seed}.")

    @property
    def dropout_rate(self) -> float:
        """``unilora_dropout``."""
        return self.unilora_dropout

    @property
    def frozen(self) -> tuple[str, ...]:
        """The places and their scales, if files have them."""
        return tuple(self.axes) if self.save_indices else ()

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Those of the places and their scales, if files have them; nothing is trained in a layer of its own."""
        own: dict[str, tuple[int, ...]] = {FIRST: (self.r, n_in), SECOND: (n_out, self.r)}
        own |= {SCALES[role]: shape for role, shape in own.items()}
        return own if self.save_indices else {}

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Nothing but the state; `carry` and `numbered` have the arrays."""
        return {}, self.state(names, adapted)

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The vector."""
        return {VECTOR: (self.theta_d_length,)}

    def initial(self, sizes: Mapping[str, tuple[int, int]], key: jax.Array) -> dict[str, jax.Array]:
        """A vector of uniform numbers, or of normal ones."""
        shape = (self.theta_d_length,)
        if not self.init_weights:
            return {VECTOR: jax.random.normal(key, shape)}
        return {VECTOR: self.init_theta_d_bound * jax.random.uniform(key, shape, minval=-1.0)}

    def numbered(
        self, sizes: Mapping[str, tuple[int, int]], names: np.ndarray, adapted: np.ndarray, *, lookup: bool
    ) -> dict[str, jax.Array]:
        """The places of a leaf's elements in the vector, and their scales."""
        counts = [self.r * (n_in + n_out) for n_in, n_out in sizes.values()]
        places, scales = _places(sum(counts), self.theta_d_length, self.proj_seed)
        starts = dict(zip(sizes, np.cumsum([0, *counts]).tolist(), strict=False))
        n_in, n_out = sizes[next(str(name) for name in names[adapted].flat)]
        shapes = {FIRST: (self.r, n_in), SECOND: (n_out, self.r)}
        found = {role: np.zeros((*names.shape, *shape), np.int32) for role, shape in shapes.items()}
        for index in zip(*np.nonzero(adapted), strict=True) if adapted.ndim else [()]:
            start = starts[str(names[index])]
            middle = start + self.r * n_in
            found[FIRST][index] = places[start:middle].reshape(shapes[FIRST])
            found[SECOND][index] = places[middle : middle + self.r * n_out].reshape(shapes[SECOND])
        scaled = {SCALES[role]: jnp.asarray(scales[array]) for role, array in found.items()}
        return {role: jnp.asarray(array) for role, array in found.items()} | scaled

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if a place of a file is outside of the vector."""
        for role in (FIRST, SECOND):
            if role in arrays:
                check_indices(role, arrays[role], self.theta_d_length, path)

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The elements of the vector in the first leaf's first layer."""
        sizes = np.zeros(np.shape(state["hit"]), int)
        if VECTOR in params:
            sizes[(0,) * sizes.ndim] = params[VECTOR].shape[-1]
        return sizes

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """The elements of the vector at their places, scaled."""
        vector = self.all_layers(params, state, VECTOR)
        first = _taken(vector, state[FIRST]) * state[SCALES[FIRST]].astype(vector.dtype)
        second = _taken(vector, state[SECOND]) * state[SCALES[SECOND]].astype(vector.dtype)
        second = jnp.where(state["hit"][..., None, None], second, 0)
        return jnp.swapaxes(first, -1, -2), jnp.swapaxes(second, -1, -2)


def _taken(vector: Float[Array, "*groups elements"], places: jax.Array) -> Float[Array, "*groups rows columns"]:
    """The elements at places, group by group."""

    def take(vector: jax.Array, places: jax.Array) -> jax.Array:
        return vector[places]

    for _ in range(vector.ndim - 1):
        take = jax.vmap(take)
    return take(vector, places)


@functools.lru_cache(maxsize=2)  # as long as all factors together
def _places(count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each of ``count`` elements in a vector, and the scale at each place of that.

    Each place is taken equally often, or once more.
    """
    generator = np.random.default_rng(seed)
    times, rest = divmod(count, length)
    places = np.repeat(np.arange(length), times)
    if rest:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    taken = np.bincount(places, minlength=length)
    return places, (1 / np.sqrt(np.maximum(taken, 1).astype(np.float32))).astype(np.float32)
