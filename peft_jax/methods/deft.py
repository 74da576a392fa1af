"""DEFT: W' = W - W P Q' + s R Q': a part of the outputs is taken away, and another one is put there.

NeurIPS 2025,
https://proceedings.neurips.cc/paper_files/paper/2025/hash/93a34a7138bdad95e874018d5f491cc6-Abstract-Conference.html:
Q is trained, (out, r), and the part that is taken away is read off with P, which is made of it: its positive elements,
or an orthonormal basis that is then Q too. R, (in, r), is trained; without it the part is only taken away (PaRa: Chen
et al., 2024, https://arxiv.org/abs/2406.05641). Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.dropout import dropout
from peft_jax.core.product import Convolution, Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability, check_rank
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

DIRECTIONS, INJECTION = "deft_P", "deft_R"
SPREAD = 0.02  # of random numbers


@register("DEFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeftConfig(TargetFields, ExcludeFields, LayerFields, StartsFromWeight, Method):
    """Takes a few directions of a layer's outputs away and puts trained ones there; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Number of directions, at least 1; of a module with fewer outputs that many.
        decomposition_method: ``"relu"`` reads a direction off with its positive elements, and ``"qr"`` makes the
            directions orthonormal, so that they are taken away whole.
        init_scale: Factor of random numbers where ``init_weights=False``.
        alpha: What is put there is scaled by ``alpha / r``; None and 0 stand for no scale.
        para: Whether directions are only taken away. Such an adapter starts with a change.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        deft_dropout: Probability of zeroing an input of what is put there in training, in [0, 1).
        init_weights: True starts at no change, for which it looks at the weight; False at a random one.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"deft_only"`` (those of adapted modules).

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, DeftConfig(r=2, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'deft_P': (6, 2), 'deft_R': (8, 2)}
    """

    reads_base: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {DIRECTIONS: ("out", "rank"), INJECTION: ("in", "rank")}
    structural: ClassVar[tuple[str, ...]] = ("decomposition_method", "alpha")

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "deft_dropout")
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"decomposition_method is 'relu' or 'qr', got {self.decomposition_method!r}.")

    @property
    def dropout_rate(self) -> float:
        """``deft_dropout``, if there are inputs to drop."""
        return 0.0 if self.para else self.deft_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The directions, and what is put there."""
        rank = min(self.r, n_out)
        directions: dict[str, tuple[int, ...]] = {DIRECTIONS: (n_out, rank)}
        return directions if self.para else {**directions, INJECTION: (n_in, rank)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Small normal numbers."""
        scale = self.init_scale if role == INJECTION else 1.0
        return SPREAD * scale * jax.random.normal(key, shape)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init`; what is put there is what is taken away of the weight without other adapters."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        if self.init_weights and INJECTION in params:
            taken = self._taken
            for _ in base.layout.stack:
                taken = jax.vmap(taken)
            part = taken(params, state, base.layout.matrix(base.unadapted.dense()))
            params[INJECTION] = jnp.where(adapted[..., None, None], part / self._scale(params), 0)
        return params, state, base

    def merge(
        self,
        params: Arrays,
        state: Arrays,
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W - U P Q' + s R Q'`` in float32, with ``unadapted`` as U, the weight without other adapters; None: W."""
        directions, _ = self._directions(params, state)
        first = -self._taken(params, state, matrix if unadapted is None else unadapted)
        if INJECTION in params:
            first = first + self._injection(params)
        return (matrix.astype(jnp.float32) + first @ directions.T).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W - (x U) P Q' + (dropout(x) s R) Q'``; a convolution needs the merged matrix, and has no dropout."""
        if isinstance(product, Convolution):
            if "dropout" in state:
                raise ValueError("DEFT has no dropout for convolutions. Write deft_dropout=0.")
            return apply_merged(self, params, state, base, x, product)
        directions, reading = self._directions(params, state)
        y = base.apply(x, product)
        unadapted = base.unadapted.apply(x, product) if base.depth else y
        inner = -product.up(unadapted.astype(jnp.float32), reading)
        if INJECTION in params:
            given = x if product.looks_up else dropout(x, state)
            inner = inner + product.down(given, self._injection(params))
        update = product.up(inner, jnp.swapaxes(directions, -1, -2))
        return product.added(y, update)

    def _directions(
        self, params: Arrays, state: Mapping[str, Any]
    ) -> tuple[Float[Array, "*groups out rank"], Float[Array, "*groups out rank"]]:
        """``Q`` and ``P`` in float32; ``Q`` is zero for a layer that is not adapted."""
        hit = state["hit"][..., None, None]
        directions = params[DIRECTIONS].astype(jnp.float32)
        if self.decomposition_method == "relu":
            return jnp.where(hit, directions, 0), jax.nn.relu(directions)
        # No basis has a gradient where the directions are zero, which those of layers that are not adapted are.
        n_out, rank = directions.shape[-2:]
        basis, _ = jnp.linalg.qr(jnp.where(hit, directions, jnp.eye(n_out, rank)))
        return jnp.where(hit, basis, 0), basis

    def _taken(
        self, params: Arrays, state: Mapping[str, Any], matrix: Float[Array, "in out"]
    ) -> Float[Array, "in rank"]:
        """``W P``."""
        return matrix.astype(jnp.float32) @ self._directions(params, state)[1]

    def _injection(self, params: Arrays) -> Float[Array, "*groups in rank"]:
        """``s R``."""
        return self._scale(params) * params[INJECTION].astype(jnp.float32)

    def _scale(self, params: Arrays) -> float:
        """``alpha / r``, if there is an ``alpha``."""
        return self.alpha / params[DIRECTIONS].shape[-1] if self.alpha else 1.0
