"""PEANuT: W' = W + s f(W), where f is a small network, and the rows of W (the weights of an input) are its inputs.

Zhong et al., 2024, https://arxiv.org/abs/2410.01870: f(W) = σ(W A) B, with ``depth`` more layers before and behind the
middle, whose outputs are added. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.activations import ACTIVATIONS, check_activation
from peft_jax.core.float_types import added
from peft_jax.core.product import Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import Weight, as_leaf, as_weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_rank, kaiming
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

A, B = "peanut_A", "peanut_B"
DEEPEST = 8
ENCODERS = tuple(f"peanut_encoders.{number}" for number in range(DEEPEST))
DECODERS = tuple(f"peanut_decoders.{number}" for number in range(DEEPEST))


@register("PEANUT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(TargetFields, ExcludeFields, LayerFields, Method):
    """Adds what a small network makes of the matrix; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Width of the network, at least 1.
        depth: Number of its layers before the middle, and of those behind it, from 0 to 8.
        act_fn: Its activation, by transformers' name; ``"prelu"`` and ``"xielu"`` are refused.
        scaling: The factor of the change.
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, PeanutConfig(r=2, depth=1, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'peanut_A': (3, 2), 'peanut_B': (2, 3), 'peanut_encoders.0': (2, 2), 'peanut_decoders.0': (2, 2)}
    """

    takes_conv1d: ClassVar[bool] = False
    reads_base: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        A: ("out", "rank"),
        B: ("rank", "out"),
        **dict.fromkeys(ENCODERS + DECODERS, ("given", "made")),
    }
    structural: ClassVar[tuple[str, ...]] = ("act_fn",)

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_activation("act_fn", self.act_fn)
        if not 0 <= self.depth <= DEEPEST:
            raise ValueError(f"depth={self.depth} is not supported. Write a number from 0 to {DEEPEST}.")

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The layers of the network."""
        inner = dict.fromkeys(ENCODERS[: self.depth] + DECODERS[: self.depth], (self.r, self.r))
        return {A: (n_out, self.r), B: (self.r, n_out), **inner}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random layers, of which the last one may be of zeros."""
        return jnp.zeros(shape) if role == B and self.init_weights else kaiming(key, shape, shape[0])

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale of each stacked layer, 0 where it is not adapted."""
        return {
            "hit": jnp.asarray(adapted),
            "scaling": jnp.asarray(np.where(adapted, self.scaling, 0), jnp.float32),
        }

    def merge(
        self,
        params: Arrays,
        state: Arrays,
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W + s f(U)`` with ``unadapted`` as U, the weight without the adapters under this one; None if U is W."""
        change = self._hidden(params, matrix if unadapted is None else unadapted) @ _last(params, state)
        return added(matrix, change)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + s (x σ(U A)) B``, with a network that backward runs again, and a ``U`` that it makes again."""
        layout = base.layout

        @jax.checkpoint
        def first(params: PyTree, leaf: Any) -> jax.Array:
            return self._hidden(params, layout.matrix(as_weight(leaf, layout).dense()))

        y = base.apply(x, product)
        update = product.up(product.down(x, first(params, as_leaf(base.unadapted))), _last(params, state))
        return product.added(y, update)

    def _hidden(self, params: Arrays, matrix: Float[Array, "*groups in out"]) -> Float[Array, "*groups in rank"]:
        """The outputs of the network before its last layer, for the rows of a matrix."""
        activation = ACTIVATIONS[self.act_fn]
        hidden = activation(matrix.astype(params[A].dtype) @ params[A])
        kept = []
        for role in ENCODERS:
            if role in params:
                kept.append(hidden)
                hidden = activation(hidden @ params[role])
        for role in DECODERS:
            if role in params:
                hidden = activation(hidden @ params[role]) + kept.pop()
        return hidden


def _last(params: Arrays, state: Mapping[str, Any]) -> Float[Array, "*groups rank out"]:
    """The last layer, scaled."""
    return state["scaling"][..., None, None].astype(params[B].dtype) * params[B]
