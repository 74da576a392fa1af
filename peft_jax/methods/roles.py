"""Roles: how a leaf takes part in an adapter if it is not the matrix of a target.

It is trained whole, or it is a bias that follows its layer's matrix; `peft_jax.methods.trainable_tokens` has one more.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import LAYER, apply_merged
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method

SAVED, BIAS = "modules_to_save", "bias"  # names of the role of weights that are trained whole
REPLACED = "ln_tuning_layers"  # and of those of a method that trains nothing else


class BiasRule:
    """The part of a method that changes the bias of a layer with the arrays of its matrix; `Follower` is the bias.

    Attributes:
        reads_base_bias: Whether `merge_bias` takes one argument more where there are adapters under this one: the bias
            without them.
    """

    reads_base_bias: ClassVar[bool] = False

    def changes_bias(self, module: str) -> bool:
        """Whether the adapter of a module's matrix changes its bias too."""
        raise NotImplementedError

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """The bias ``(out,)`` of a layer whose matrix is adapted by ``params``."""
        raise NotImplementedError

    def state_beside_bias(self, names: np.ndarray, adapted: np.ndarray, biased: Collection[str]) -> dict[str, Any]:
        """More frozen arrays of the matrix, given the names of all modules whose bias the adapter changes."""
        return {}


class Role:
    """The part that a leaf has in an adapter; `rule` is what computes with its arrays."""

    side_path: ClassVar[bool] = False
    first: ClassVar[str | None] = None
    reads_base: ClassVar[bool] = False
    carried: ClassVar[Collection[str]] = ()
    over_rows: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    dropout_rates: ClassVar[Mapping[str, float]] = {}

    @property
    def label(self) -> str:
        """Its name in tables, in place of a method's."""
        raise NotImplementedError

    def rule(self, config: Method) -> "Role":
        """The rule by which a leaf in this role computes, in an adapter of a config."""
        return self

    def stacks_on(self, inner: Any) -> bool:
        """Whether both can be active on one leaf."""
        return True

    def for_bias(self, params: Arrays, state: Mapping[str, Any], base: Weight) -> dict[str, jax.Array]:
        """The arrays; no bias follows a leaf in such a role."""
        return dict(params)

    def bias_roles(self, params: Arrays) -> set[str]:
        """Names of those of `for_bias`."""
        return set(params)

    def init(
        self, config: Method, base: Weight, names: np.ndarray, adapted: np.ndarray
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Trained and frozen arrays of a leaf that stands for the layers ``names``, changed where ``adapted``."""
        raise NotImplementedError

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        """The changed matrix or vector of one layer."""
        raise NotImplementedError

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """The product with the merged matrix."""
        return apply_merged(self, params, state, base, x, product)


@dataclasses.dataclass(frozen=True)
class Whole(Role):
    """A weight trained whole: PEFT's ``modules_to_save``, ``bias``, and LN_TUNING.

    The trained copy is float32 and in matrix form, ``(*stack, in, out)`` or ``(*stack, out)``; only the layers in
    ``state["hit"]`` use theirs.

    Attributes:
        name: The role's name, and that of the copy among the trained arrays.
    """

    is_whole: ClassVar[bool] = True

    name: str

    @property
    def label(self) -> str:
        """The role's name."""
        return self.name

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """A copy has the base's axes."""
        return {self.name: ("in", "out")}

    def structure(self) -> tuple[Any, ...]:
        """Equal for two adapters exactly if they run in the same compiled program."""
        return (Whole, self.name)

    def stacks_on(self, inner: Any) -> bool:
        """False: the copy would take the place of what ``inner`` makes, as if that were off."""
        return False

    def init(
        self, config: Method, base: Weight, names: np.ndarray, adapted: np.ndarray
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """A copy of the weight without other adapters, as in PEFT, and which stacked layers it replaces."""
        copy = jnp.array(base.layout.matrix(base.unadapted.dense()), jnp.float32, copy=True)
        return {self.name: copy}, {"hit": jnp.asarray(adapted)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Number of trained elements of each stacked layer."""
        adapted = np.asarray(state["hit"])
        (copy,) = params.values()
        return adapted * np.prod(copy.shape[adapted.ndim :], dtype=int)

    def merge(self, params: Arrays, state: Mapping[str, Any], matrix: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        """The copy in layers that are trained, else the base."""
        (copy,) = params.values()
        return jnp.where(state["hit"], copy.astype(matrix.dtype), matrix)


@dataclasses.dataclass(frozen=True)
class FollowingCopy(Whole):
    """A bias trained whole that the adapter of its layer's matrix changes too, as ``lora_bias`` beside ``bias``.

    Attributes:
        method: The method of the matrix, in a rule.
    """

    method: Method | None = None

    def rule(self, config: Method) -> "FollowingCopy":
        """The method changes the copy."""
        return dataclasses.replace(self, method=config)

    def structure(self) -> tuple[Any, ...]:
        """As for the copy and the method."""
        assert self.method is not None, "a rule has its method"
        return (FollowingCopy, self.name, *self.method.structure())

    def init(
        self, config: Method, base: Weight, names: np.ndarray, adapted: np.ndarray
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The copy, and the method's state."""
        params, state = super().init(config, base, names, adapted)
        return params, {**config.state(names, adapted), **state, LAYER: {}}

    def merge(self, params: Arrays, state: Mapping[str, Any], bias: jax.Array) -> jax.Array:
        """The copy, as the method changes a bias."""
        assert isinstance(self.method, BiasRule), "the plan follows no other"
        own = {name: array for name, array in state.items() if name != LAYER}
        return self.method.merge_bias(state[LAYER], own, super().merge(params, state, bias))


@dataclasses.dataclass(frozen=True)
class Follower(Role):
    """A bias that the adapter of its layer's matrix changes too, with the same arrays.

    They are trained, counted and saved with the matrix; the bias has them as ``state["layer"]``
    (`peft_jax.core.adapted_tree.tied` hands them over).

    Attributes:
        method: The method of the matrix, in a rule.
    """

    method: Method | None = None
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def label(self) -> str:
        """A bias of an adapted layer."""
        return "bias of its layer"

    def rule(self, config: Method) -> "Follower":
        """The method changes the bias."""
        return Follower(method=config)

    @property
    def reads_base(self) -> bool:  # type: ignore[override]  # of a rule, not of the class
        """Whether the method changes a bias by what it is without the adapters under this one."""
        return isinstance(self.method, BiasRule) and self.method.reads_base_bias

    @property
    def _method(self) -> Method:
        assert self.method is not None, "a rule has its method"
        return self.method

    def structure(self) -> tuple[Any, ...]:
        """As for the method."""
        return (Follower, *self._method.structure())

    def stacks_on(self, inner: Any) -> bool:
        """As the methods of their layer's matrices do."""
        return isinstance(inner, Follower) and self._method.stacks_on(inner._method)

    def init(
        self, config: Method, base: Weight, names: np.ndarray, adapted: np.ndarray
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Nothing to train, and the method's state."""
        return {}, {**config.state(names, adapted), LAYER: {}}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """None."""
        return np.zeros((), int)

    def merge(
        self, params: Arrays, state: Mapping[str, Any], bias: Float[Array, "*axes"], *unadapted: Float[Array, "*axes"]
    ) -> Float[Array, "*axes"]:
        """As the method changes a bias."""
        own = {name: array for name, array in state.items() if name != LAYER}
        assert isinstance(self.method, BiasRule), "the plan follows no other"
        return self.method.merge_bias(state[LAYER], own, bias, *unadapted)
